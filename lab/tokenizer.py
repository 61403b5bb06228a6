"""The lab's tokenizer: byte-level BPE of at most 512 tokens with a ChatML template.

Byte-level, so that any text round-trips (GSM8K too); digits stay single, so that arithmetic is done digit by digit;
punctuation takes the spaces around it (` + `, ` = `) and `\\boxed{` is one piece, so that a worked step costs few
tokens. The folder it is saved to loads with `AutoTokenizer.from_pretrained`, eos, pad and chat template included.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, END_ID = 0, 2  # the trainer numbers the special tokens first
_PIECES = r"\p{N}|\\boxed\{| ?\p{L}+| ?[^\s\p{L}\p{N}]+ ?|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learns the merges from chat-rendered texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def load(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a folder."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def chat_prompt(prompt: str) -> str:
    """The text a model continues; equals the chat template with `add_generation_prompt` (a test compares them)."""
    return f"{START}user\n{prompt}{END}\n{START}assistant\n"
