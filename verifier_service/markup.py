"""What shows a value, without what only dresses it: bold, colours, sizes, HTML, JSON, "the answer is". No sympy."""

import html
import re

from .characters import characters

ENTITY = re.compile(r"&(?:[a-z]{2,8}|#[0-9]{1,6}|#x[0-9a-f]{1,5});")
TAGS = "b|i|u|em|strong|code|span|font|mark|p|div|center|small|big|tt|math|mn"
TAG = re.compile(rf"<({TAGS})(?:\s+[a-z-]+=(?:\"[^\"<>]*\"|'[^'<>]*'))*\s*>([^<>]*)</\1\s*>", re.IGNORECASE)
RAISED_TAG = re.compile(r"<(sup|sub)>([^<>]*)</\1>", re.IGNORECASE)
BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
AROUND = re.compile(
    r"(?s)```[a-z]*\n(.*)\n?```|(\*\*|__|``?|\*|~~)(?=\S)((?:(?!\2).)*)(?<=\S)\2(\.?)|[\"'“”](.*)[\"'“”]"
)
JSON = re.compile(r'\{\s*"(?:final[_ ])?(?:answer|result|value)"\s*:\s*("?)([^"{}]*)\1\s*\}', re.IGNORECASE)
STYLE = (
    r"mathbf|mathrm|mathsf|mathit|mathtt|mathnormal|boldsymbol|bm|pmb|boxed|fbox|ensuremath|underline|emph|textbf|textit"
    r"|textsf|texttt|textrm|textup|textnormal|mbox|hbox|text|bold|uline"
)
BRACE = re.compile(rf"\\(?P<style>{STYLE})\s*\{{|\\[{{}}]|(?P<open>\{{)|\}}")
STYLED = re.compile(rf"\\(?:{STYLE}|operatorname\*?)\s*\{{([^{{}}]*)\}}")
COLOURED = re.compile(r"\\(?:(textcolor|colorbox)|color)\s*(?:\[[a-zA-Z]*\])?\{[^{}]*\}\s*((?(1)\{))")
NO_MEANING = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|hfill|noindent|centering|left|right|middle"
    r"|[bB]ig{1,2}[lrm]?|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
    r"|bf|it|rm|sf|tt|sl|em|bfseries|itshape|rmfamily|mathopen|mathclose)(?![A-Za-z])\s?"
    r"|\\(?:hspace|vspace|hskip|kern|phantom|hphantom|vphantom|tag|label)\*?\s*\{[^{}]*\}|\\!\s*|\\/"
)
SPACED = re.compile(r"(?<!\\)\\(?:(?:quad|qquad|enspace|thinspace|enskip|space)(?![A-Za-z])|[,;: >])|~")
SHORT = (
    *(("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cfrac", "\\frac"), ("\\dbinom", "\\binom")),
    *(("\\leqslant", "\\le"), ("\\geqslant", "\\ge"), ("\\leq", "\\le"), ("\\geq", "\\ge"), ("\\neq", "\\ne")),
    *(("\\lbrace", "\\{"), ("\\rbrace", "\\}"), ("\\lvert", "|"), ("\\rvert", "|"), ("\\vert", "|"), ("\\%", "%")),
    *(("\\varnothing", "\\emptyset"), ("\\dots", "\\ldots"), ("\\cdots", "\\ldots"), ("\\colon", ":")),
    *(("^{\\circ}", "^\\circ"), ("\\degree", "^\\circ"), ("\\div", "/")),
)
AHEAD = re.compile(r"\s*(?:=|\\therefore|\\implies|\\Rightarrow|\\Longrightarrow|\\to)(?![A-Za-z=])\s*")
PERCENT = re.compile(
    r"\s*\\text\{\s*(?:percent|pct|per cent)\s*\}|(?<=[0-9])\s*(?:percent|per cent|pct)\b", re.IGNORECASE
)
NAMED = re.compile(
    r"\\text\{[^{}]*\}|(?<![\\A-Za-z])(sqrt|pi|theta|alpha|beta|infinity|infty|sin|cos|tan|ln|log|frac(?=\{))(?![A-Za-z])"
)
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+(?=[^\s{])")
LEAD_IN = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct)\s+)?(?:answer|result|solution|value)"
    r"(?:\s+(?:is|equals|=)(?:\s*:)?|\s*[:=])\s*",
    re.IGNORECASE,
)
LETTERS = re.compile(r"[A-Za-z]")
TEXT = re.compile(r"\\text\{([^{}]*)\}")


def _unstyled(match: re.Match[str]) -> str:
    """A styled group without its style; words stay words, as `\\text{…}`."""
    inner = match[1]
    command = match[0][1:].split("{", 1)[0].strip().rstrip("*")
    words = command in (
        "text",
        "mbox",
        "hbox",
        "textrm",
        "textbf",
        "textit",
        "textsf",
        "texttt",
        "textup",
        "textnormal",
        "emph",
    )
    if command == "operatorname" or (command == "mathrm" and len(inner.strip()) > 1 and LETTERS.search(inner)):
        return rf"\{inner.strip()} " if inner.strip() in FUNCTIONS.split() else rf"\text{{{inner}}}"
    if not words or not LETTERS.search(inner):
        return f" {inner}" if inner[:1].isspace() else inner
    if len(inner.strip()) == 1:
        return rf"\text{{{inner}}}" if inner.strip() not in "ei" else inner.strip()
    return rf"\text{{{inner}}}"


def _undressed(text: str) -> str:
    """Without the styles around groups that hold groups."""
    parts, stack, end = list[str](), list[int](), 0  # of each open brace its part
    for match in BRACE.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        if match[0] == "}" and stack:
            parts.append("}" if parts[stack.pop()] else "")
            continue
        if stack and parts[stack[-1]].startswith("\\text"):
            parts[stack[-1]] = ""
        if match["style"] or match["open"]:
            stack.append(len(parts))
        parts.append("" if match["style"] and match["style"] != "text" else match[0])
    return "".join([*parts, text[end:]])


FUNCTIONS = "sin cos tan cot sec csc log ln exp arcsin arccos arctan sinh cosh tanh gcd lcm min max det"


def markup(text: str) -> str:
    """What shows a value, without what only dresses it."""
    text = text.strip()
    if "&" in text:
        text = ENTITY.sub(lambda match: characters(html.unescape(match[0])), text)
    if "<" in text and ">" in text:
        text = RAISED_TAG.sub(lambda match: f"{'^' if match[1].lower() == 'sup' else '_'}{{{match[2]}}}", text)
        text = BREAK.sub(" ", text)
        for _ in range(3):  # in one another
            text = TAG.sub(lambda match: match[2], text).strip()
    if (found := JSON.fullmatch(text)) or (found := JSON.fullmatch(f"{{{text}}}")):
        text = found[2].strip()
    for _ in range(3):
        found = AROUND.fullmatch(text)
        inner = next((group for group in (found[1], found[3], found[5]) if group is not None), None) if found else None
        if inner is None or not inner.strip():
            break
        text = inner.strip()
    text = text.replace("~", " ").replace("...", "\\ldots ").replace("{,}", ",")
    if ahead := AHEAD.match(text):
        text = text[ahead.end() :]
    if "\\" not in text:
        text = " ".join(text.split())
        return LEAD_IN.sub("", text, count=1) if LEAD_IN.match(text) else text
    text = BARE_BOX.sub("", text)
    for long, short in SHORT:
        text = re.sub(rf"{re.escape(long)}(?![A-Za-z])", lambda _, short=short: short, text) if long in text else text
    for _ in range(3):
        text = STYLED.sub(_unstyled, COLOURED.sub(lambda match: r"\bold{" if match[2] else "", text))
    text = _undressed(text)
    text = SPACED.sub(" ", NO_MEANING.sub("", text)).strip()
    text = re.sub(r"\{ *\}|\s+", " ", text)
    if match := re.match(r"\\text\{([^{}]*)\}\s*", text):
        lead = LEAD_IN.fullmatch(match[1].strip() + " ") or LEAD_IN.fullmatch(match[1])
        if lead:
            text = text[match.end() :]
        elif LEAD_IN.match(match[1]):
            text = rf"\text{{{LEAD_IN.sub('', match[1], count=1)}}}{text[match.end() :]}"
    return LEAD_IN.sub("", text, count=1) if LEAD_IN.match(text) else text
