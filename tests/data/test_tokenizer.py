from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megarlhf.data.arithmetic import ArithmeticConfig, demonstration, problems, words
from megarlhf.data.tokenizer import LLAMA3_CHAT_TEMPLATE, Message, Tokenizer, build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import ConfigError, DataError

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tiny() -> Tokenizer:
    return build_tiny_tokenizer(words())


def byte_level(directory: Path, special: list[str], **settings: str) -> Path:
    """A byte-level BPE tokenizer of Llama 3's kind, saved the way `transformers` saves one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["What is 2 + 3? The answer is 5."] * 4,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_every_built_in_text_survives_a_round_trip_in_one_token_a_word(level: int) -> None:
    from random import Random

    tokenizer = tiny()
    for problem in problems(ArithmeticConfig(level=level, rows=200), "train"):
        kinds = ("none", "drop_last_step", "wrong_operation", "guess")
        for text in (problem.text, *(demonstration(problem, kind, Random(0)) for kind in kinds)):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            marks = sum(text.count(mark) for mark in ".?")
            assert len(ids) == len(text.split()) + marks


def test_vocabulary_is_small_and_pad_is_not_eos() -> None:
    tokenizer = tiny()
    assert tokenizer.vocab_size == 6 + 4 + len(words()) <= 160
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3
    assert tokenizer.encode("<|eot_id|>") == [tokenizer.eos_id]


def test_chat_template_is_the_published_llama_3_format() -> None:
    text = tiny().render_chat(
        [
            {"role": "system", "content": "You are a helpful AI assistant for travel tips and recommendations"},
            {"role": "user", "content": " What can you help me with?\n"},
        ]
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful AI assistant for travel tips and recommendations<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        "What can you help me with?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_without_generation_prompt_a_conversation_ends_with_its_last_turn() -> None:
    tokenizer = tiny()
    messages: list[Message] = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "The answer is 5."},
    ]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    prompt = tokenizer.encode_prompt("How many?", "chat")
    assert ids == prompt + tokenizer.encode_response("The answer is 5.")


LLAMA_32_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}{{ 'Today Date: ' + date_string + '\n' }}{{ strftime_now('%A %-d/%-m %j %H:%M') }}"
)
"""As Llama 3.2's template finds the date, and more of the clock than it asks for."""


def test_a_template_is_told_the_date_of_the_model(tmp_path: Path) -> None:
    tiny().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAMA_32_DATE + LLAMA3_CHAT_TEMPLATE)
    dated, message = load_tokenizer(tmp_path), [Message(role="user", content="What?")]
    assert dated.renders_date
    assert not tiny().renders_date
    rendered = dated.of_model([7], datetime.date(2026, 3, 5)).render_chat(message)
    assert rendered == "Today Date: 05 Mar 2026\nThursday 5/3 064 00:00" + tiny().render_chat(message)
    # Told nothing, it is today there, as in transformers itself.
    before = datetime.date.today()
    said = dated.render_chat(message)
    assert said.partition("\n")[0] in {f"Today Date: {day:%d %b %Y}" for day in (before, datetime.date.today())}
    # A template that asks for no date pins none.
    assert (tiny().of_model([7], before).date, tiny().of_model([7, 4], before).eos_ids) == (None, (4, 7))


def test_prompt_lengths_chat_and_plain() -> None:
    tokenizer = tiny()
    words_in = len(tokenizer.encode("How many books does Ann have?"))
    assert words_in == 7
    assert tokenizer.encode_prompt("How many books does Ann have?", "plain")[0] == tokenizer.bos_id
    assert len(tokenizer.encode_prompt("How many books does Ann have?", "plain")) == words_in + 1
    # BOS, four tokens of each header, EOT.
    assert len(tokenizer.encode_prompt("How many books does Ann have?", "chat")) == words_in + 10


def test_plain_refuses_a_conversation() -> None:
    with pytest.raises(DataError, match="template=chat"):
        tiny().encode_prompt([{"role": "user", "content": "How many?"}], "plain")


def test_decode_leaves_special_tokens_out() -> None:
    tokenizer = tiny()
    ids = [tokenizer.bos_id or 0, *tokenizer.encode_response("The answer is 5."), tokenizer.pad_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "The answer is 5."


def test_unknown_words_are_named() -> None:
    with pytest.raises(DataError, match=r"vocabulary.*'Bob', 'elephants'"):
        tiny().encode("Bob has 5 elephants.")


def test_saved_tokenizer_loads_equal_here_and_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny()
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = problems(ArithmeticConfig(rows=1), "train")[0].text
    assert loaded.encode_prompt(text, "chat") == tokenizer.encode_prompt(text, "chat")
    assert (loaded.vocab_size, loaded.pad_id, loaded.eos_id, loaded.bos_id) == (
        tokenizer.vocab_size,
        tokenizer.pad_id,
        tokenizer.eos_id,
        tokenizer.bos_id,
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    ) == tokenizer.encode_prompt(text, "chat")


def test_instruct_tokenizer_ends_responses_with_eot_and_pads_with_llama_3s_pad(tmp_path: Path) -> None:
    special = [*SPECIAL, "<|finetune_right_pad_id|>"]
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": LLAMA3_CHAT_TEMPLATE}
    tokenizer = load_tokenizer(byte_level(tmp_path, special, **names))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (4, 5)
    assert tokenizer.decode(tokenizer.encode_response("What is 2 + 3?\n\nß")) == "What is 2 + 3?\n\nß"


def saying(directory: Path, template: object) -> Path:
    """A tokenizer whose tokenizer_config.json has this as its chat template."""
    special = [*SPECIAL, "<|finetune_right_pad_id|>"]
    path = byte_level(directory, special, bos_token=SPECIAL[0], eos_token=SPECIAL[1]) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return directory


@pytest.mark.parametrize("template", [5, True, ["a", "b"], [{"name": "default", "template": 5}]])
def test_a_template_that_is_no_text_is_refused(template: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}.*(is no text but|restore tokenizer.json)"):
        load_tokenizer(saying(tmp_path, template))


def test_of_several_templates_the_default_counts(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}]
    without = load_tokenizer(saying(tmp_path / "a", named))
    assert (without.eos_id, without.renders_date) == (1, False)
    with pytest.raises(ConfigError, match="no chat template"):
        without.encode_prompt("What?", "chat")
    both = load_tokenizer(saying(tmp_path / "b", [*named, {"name": "default", "template": LLAMA3_CHAT_TEMPLATE}]))
    assert both.eos_id == 4
    assert both.decode_all(both.encode_prompt("What?", "chat")).startswith("<|begin_of_text|>")


def test_base_tokenizer_ends_responses_with_its_eos(tmp_path: Path) -> None:
    special = [*SPECIAL, "<|reserved_special_token_0|>"]
    tokenizer = load_tokenizer(byte_level(tmp_path, special, bos_token=SPECIAL[0], eos_token=SPECIAL[1]))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 5)
    with pytest.raises(ConfigError, match=r"no chat template.*template=plain"):
        tokenizer.encode_prompt("What?", "chat")


def test_pad_equal_to_eos_is_refused(tmp_path: Path) -> None:
    directory = byte_level(tmp_path, SPECIAL, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    with pytest.raises(DataError, match=r"learn to stop; set another pad_token"):
        load_tokenizer(directory)


def test_no_pad_and_no_eos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pad_token"):
        load_tokenizer(byte_level(tmp_path / "pad", SPECIAL, eos_token=SPECIAL[1]))
    with pytest.raises(DataError, match="no eos_token"):
        load_tokenizer(byte_level(tmp_path / "eos", ["<pad>"], pad_token="<pad>"))


def test_a_template_that_refuses_the_turns_is_a_data_error(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    directory = byte_level(tmp_path, SPECIAL, eos_token=SPECIAL[1], pad_token=SPECIAL[2], chat_template=template)
    with pytest.raises(DataError, match=r"refuses the roles \['user'\]: roles must alternate"):
        load_tokenizer(directory).encode_prompt("What?", "chat")


def test_missing_partial_and_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory = tmp_path / name
        tiny().save(directory)
        (directory / name).unlink()
        with pytest.raises(DataError, match=f"partial: .* lacks {name}"):
            load_tokenizer(directory)
        (directory / name).write_text("{")
        with pytest.raises(DataError, match="cannot be read"):
            load_tokenizer(directory)


def test_code_in_the_directory_is_never_run(tmp_path: Path) -> None:
    tiny().save(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="own Python code is not supported"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_settings_in_the_file_neither_cut_nor_pad(tmp_path: Path) -> None:
    tiny().save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=20)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("The answer is 5.") == tiny().encode("The answer is 5.")
