"""Signs of Unicode as LaTeX. No sympy; linear in the text."""

import re
import unicodedata

INVISIBLE = (
    "\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062\u2063\u2066\u2067\u2068\u2069"
    "\ufeff\u00ad\ufe0e\ufe0f"
)
LETTERS_OF = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
NAMES_OF = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
SIGNS = {
    **dict.fromkeys("−–‐‑‒﹣", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **{"≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ "},
    **{"∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∖": r"\setminus ", "→": r"\to "},
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"},
    **{
        "⌊": r"\lfloor ",
        "⌋": r"\rfloor ",
        "⌈": r"\lceil ",
        "⌉": r"\rceil ",
        "∣": r"\mid ",
        "∨": r"\lor ",
        "∧": r"\land ",
    },
    **{"…": r"\ldots ", "⋯": r"\ldots ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∠": r"\angle "},
    **dict.fromkeys("′’ʹ", "'"),
    **{"″": "''", "‰": r"\permille ", "％": "%", "⟨": r"\langle ", "⟩": r"\rangle "},
    **dict(zip("，．：；（）［］｛｝＋－＝＜＞／＊", ",.:;()[]{}+-=<>/*", strict=True)),
    **{letter: f"\\{name} " for letter, name in zip(LETTERS_OF, NAMES_OF.split(), strict=True)},
    **{"ϕ": r"\phi ", "ϵ": r"\epsilon ", "ℓ": r"\ell "},
}
TABLE = str.maketrans({**dict.fromkeys(INVISIBLE, ""), **dict.fromkeys(SPACES, " "), **SIGNS})
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₒₓₙᵢⱼₖₘ", "0123456789+-()aeoxnijkm")
RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₒₓₙᵢⱼₖₘ]+")
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
ROOT = re.compile(r"([√∛∜])\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))")


def _fraction(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{over}}}{{{under}}}"


VULGAR = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉]")


def characters(text: str) -> str:
    """Signs of Unicode as LaTeX, and digits of any script as 0-9. What is ASCII stays as it is."""
    if text.isascii():
        return text
    text = RAISED_RUN.sub(lambda match: f"^{{{match[0].translate(RAISED)}}}", text)
    text = LOWERED_RUN.sub(lambda match: f"_{{{match[0].translate(LOWERED)}}}", text)
    text = VULGAR.sub(_fraction, text)
    text = ROOT.sub(lambda match: f"{ROOTS[match[1]]}{{{match[2] or match[3] or match[4] or ''}}}", text)
    text = text.translate(TABLE)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)
    return text
