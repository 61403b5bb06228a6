"""Chat templates in the shape of public families, on the lab's tokenizer with marks added to it; prompts in them."""

from tutorloop.contracts.records import Prompt
from tutorloop.models.chat import tokenize_prompt
from tutorloop.models.loading import load_tokenizer

CHATML = (  # the lab's
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Q3 = (  # puts what stands before </think> into a block that it writes itself, an empty one too
    "{%- for message in messages %}{%- if message.role in ('user', 'system') %}{{- '<|im_start|>' + message.role + '\n'"
    " + message.content + '<|im_end|>\n' }}{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- set reasoning = '' %}{%- if '</think>' in content %}{%- set reasoning = content.split('</think>')[0]"
    ".rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + "
    "content.lstrip('\n') }}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
R1 = (  # drops the reasoning of turns, and opens it in the generation prompt
    "{% for message in messages %}{% if message['role']=='user' %}{{ '<|im_start|>user\n' + message['content'] }}"
    "{% else %}{% set content=message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>assistant\n' + content + '<|im_end|>' "
    "}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
DROPS = R1.replace("<think>\n' }}{% endif %}", "' }}{% endif %}")  # drops it, and opens nothing
PARTS = "{% for m in messages %}<|im_start|>{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>{% endfor %}"
TEMPLATES = {"chatml": CHATML, "q3": Q3, "r1": R1, "drops": DROPS}
OFF = {"enable_thinking": False}


def tokenizer_of(name, marks=("<think>", "</think>"), special=False):
    tokenizer = load_tokenizer("lab:student")
    tokenizer.add_tokens([*marks], special_tokens=special)
    tokenizer.add_tokens(["kg", "C1=CC"])
    tokenizer.chat_template = TEMPLATES.get(name, name).replace("<think>", marks[0]).replace("</think>", marks[1])
    return tokenizer


def prompts_of(tokenizer, arguments=None):
    ids = tokenize_prompt(tokenizer, "3 + 4 =", arguments or {})
    return [Prompt(prompt_id="p", text="3 + 4 =", token_ids=ids, answer="7")]
