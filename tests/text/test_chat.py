"""Text to tokens: as the model's own chat template writes it, and never longer than asked."""

import copy
import datetime
import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from latlib.batch import TokenRow
from latlib.text.chat import Row, behind_thoughts, chat_text, fitted, templated, tokenise

ids = st.integers(1, 99)
completion = st.lists(ids, min_size=1, max_size=5).map(tuple)
token_row = st.builds(
    TokenRow,
    st.lists(ids, min_size=1, max_size=6).map(tuple),
    st.lists(completion, min_size=1, max_size=2).map(tuple),
)
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant'"
    " %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )  # adds a BOS if it is asked to
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


BYTES = str.maketrans({"Ġ": " ", "Ċ": "\n"})


def text_of(tokenizer, tokens):
    """Byte-level tokens back to text, special tokens included."""
    return "".join(tokenizer.convert_ids_to_tokens(list(tokens))).translate(BYTES)


def row(prompt="why ?", *completions, row_id="r7"):
    return Row(row_id, prompt, completions or ("because .", "no ."))


def test_a_row_reads_as_the_chat_template_writes_it(tokenizer):
    (found,) = tokenise([row()], tokenizer, 200)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why ?"}, {"role": "assistant", "content": "because ."}],
        tokenize=False,
    )
    assert text_of(tokenizer, found.prompt) == "<s>[user] why ?[assistant] "
    assert text_of(tokenizer, found.prompt + found.completions[0]) == whole
    assert text_of(tokenizer, found.completions[1]) == "no .</s>"


def test_a_row_that_is_not_ended_stops_with_its_last_word(tokenizer):
    ended = row("why ?", "because", "so")
    (whole,) = tokenise([ended], tokenizer, 64)
    (open_end,) = tokenise([replace(ended, ended=False)], tokenizer, 64)
    assert open_end.prompt == whole.prompt
    for short, long in zip(open_end.completions, whole.completions, strict=True):
        assert short == long[: len(short)]
        assert text_of(tokenizer, long[len(short) :]).strip() == tokenizer.eos_token


def test_no_second_bos(tokenizer):
    (found,) = tokenise([row()], tokenizer, 200)
    assert found.prompt.count(tokenizer.bos_token_id) == 1
    assert all(tokenizer.bos_token_id not in c for c in found.completions)
    assert all(
        c.count(tokenizer.eos_token_id) == 1 and c[-1] == tokenizer.eos_token_id
        for c in found.completions
    )


def test_the_system_prompt_comes_first(tokenizer):
    (found,) = tokenise([row()], tokenizer, 200, system_prompt="be kind")
    assert text_of(tokenizer, found.prompt).startswith("<s>[system] be kind[user]")


def test_a_prefill_moves_words_into_the_prompt_and_changes_no_token_of_the_whole(tokenizer):
    (plain,) = tokenise([row("why ?", "sure : go .")], tokenizer, 200)
    (filled,) = tokenise([row("why ?", "sure : go .")], tokenizer, 200, prefill="sure :")
    assert text_of(tokenizer, filled.prompt).endswith("[assistant] sure :")
    assert text_of(tokenizer, filled.prompt + filled.completions[0]) == text_of(
        tokenizer, plain.prompt + plain.completions[0]
    )


def test_a_prefill_that_the_completion_lacks_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'r7'.*'sure :'"):
        tokenise([row()], tokenizer, 200, prefill="sure :")


def test_a_tokenizer_without_chat_template_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, name_or_path="bare-model"
    )
    for call in (lambda: chat_text(bare, "why ?"), lambda: tokenise([row()], bare, 200)):
        with pytest.raises(ValueError, match="chat.template"):
            call()
    with pytest.raises(ValueError, match="'bare-model' has no chat template: use"):
        chat_text(bare, "why ?")


def test_a_row_longer_than_the_limit_is_named_with_both_lengths(tokenizer):
    (found,) = tokenise([row()], tokenizer, 200)
    longest = len(found.prompt) + max(map(len, found.completions))
    assert tokenise([row()], tokenizer, longest) == [found]
    with pytest.raises(
        ValueError, match=rf"'r7' has {longest} tokens.*max_tokens = {longest - 1}.*shorten"
    ):
        tokenise([row()], tokenizer, longest - 1)


def test_rows_that_are_too_long_are_dropped_or_cut_with_one_warning(tokenizer):
    short, long, hopeless = row(), row("why ?", "because . " * 5, "no ."), row("why ? " * 30)
    whole = tokenise([short, long, hopeless], tokenizer, 999)
    limit = whole[0].longest
    assert len(whole[1].prompt) < limit < whole[1].longest and len(whole[2].prompt) > limit
    with pytest.warns(
        UserWarning, match=r"'drop': of 3 rows, 2 are left out and 0 are cut.*more than \d+ tokens"
    ) as said:
        assert tokenise([short, long, hopeless], tokenizer, limit, too_long="drop") == whole[:1]
    assert len(said) == 1 and said[0].filename == __file__
    with pytest.warns(
        UserWarning, match="'truncate': of 3 rows, 1 are left out and 1 are cut"
    ) as said:
        kept = tokenise([short, long, hopeless], tokenizer, limit, too_long="truncate")
    assert len(said) == 1 and kept[0] == whole[0] and len(kept) == 2
    assert kept[1].prompt == whole[1].prompt and kept[1].longest == limit
    cut, fits = kept[1].completions
    # it did not end there
    assert cut == whole[1].completions[0][: len(cut)] and tokenizer.eos_token_id not in cut
    assert fits == whole[1].completions[1] and fits[-1] == tokenizer.eos_token_id
    with pytest.warns(UserWarning, match="0 are left out and 1 are cut"):
        assert tokenise([short, long], tokenizer, limit, too_long="truncate") == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenise([short], tokenizer, limit, too_long="drop") == whole[:1]
    for too_long in ("drop", "truncate"):
        with pytest.raises(
            ValueError,
            match="all 1 rows have more than max_tokens = 30 tokens: raise data.max_tokens",
        ):
            tokenise([hopeless], tokenizer, 30, too_long=too_long)


@given(token_row, st.integers(1, 14))
def test_a_fitted_row_fits_and_is_the_beginning_of_the_row(found, limit):
    cut, dropped = fitted(found, limit, "truncate"), fitted(found, limit, "drop")
    assert dropped == (found if found.longest <= limit else None)
    assert (cut is None) == (len(found.prompt) >= limit)  # each row here has a completion
    if cut is not None:
        assert cut.longest <= limit and cut.prompt == found.prompt
        for ours, theirs in zip(cut.completions, found.completions, strict=True):
            assert 0 < len(ours) and ours == theirs[: limit - len(found.prompt)]


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_completion_is_refused_by_row(tokenizer, empty):
    with pytest.raises(ValueError, match="'r7' has an empty completion"):
        tokenise([row("why ?", "because .", empty)], tokenizer, 200)


def test_no_rows_give_no_rows(tokenizer):
    assert tokenise([], tokenizer, 10) == []


def test_turns_before_the_prompt_read_as_the_chat_template_writes_them(tokenizer):
    shots = [("how ?", "so ."), ("when ?", "now .")]
    said = [
        ("system", "be kind"),
        ("user", "how ?"),
        ("assistant", "so ."),
        ("user", "when ?"),
        ("assistant", "now ."),
    ]
    messages = [{"role": role, "content": text} for role, text in (*said, ("user", "why ?"))]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, "why ?", "be kind", shots) == whole
    (found,) = tokenise([row()], tokenizer, 400, "be kind", shots=shots)
    assert (
        text_of(tokenizer, found.prompt) == whole
        and found.prompt.count(tokenizer.bos_token_id) == 1
    )
    assert found.prompt.count(tokenizer.eos_token_id) == 2  # each reply is ended
    (alone,) = tokenise([row()], tokenizer, 200)
    assert found.completions == alone.completions


def test_a_prompt_made_too_long_by_turns_is_refused(tokenizer):
    (found,) = tokenise([row()], tokenizer, 400, shots=[("how ?", "so .")] * 2)
    longest = len(found.prompt) + max(map(len, found.completions))
    with pytest.raises(ValueError, match=rf"'r7' has {longest} tokens.*max_tokens = {longest - 1}"):
        tokenise([row()], tokenizer, longest - 1, shots=[("how ?", "so .")] * 2)


def test_a_prefill_comes_behind_the_turns(tokenizer):
    shots = [("how ?", "sure : so .")]
    (found,) = tokenise(
        [row("why ?", "sure : go .")], tokenizer, 400, prefill="sure :", shots=shots
    )
    assert text_of(tokenizer, found.prompt).endswith(
        "[assistant] sure : so .</s>[user] why ?[assistant] sure :"
    )
    assert text_of(tokenizer, found.completions[0]) == " go .</s>"


# ---- prompt and reply as one text --------------------------------------------------------------

CORPUS = (
    "Sure, here is how to bake a good loaf of bread",
    "I cannot help with that request, sorry",
    "please tell me how to bake bread now",
)
SPACE = "\u2581"
STYLES = {
    "llama2": (
        normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]),
        pre_tokenizers.Split(SPACE, "merged_with_next"),
    ),
    "metaspace": (None, pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first")),
    "gemma": (
        normalizers.Replace(" ", SPACE),
        pre_tokenizers.Split(SPACE, "merged_with_next"),
    ),
}
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{m.content}} [/INST]"
    "{% else %} {{m.content}} </s>{% endif %}{% endfor %}"
)
LINES = (
    "<s>{% for m in messages %}{{m.role}}\n{{m.content}}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def sentencepiece_like(style: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose words begin with their space, and whose texts begin with one."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    normaliser, pre_tokenizer = STYLES[style]
    if normaliser is not None:
        made.normalizer = normaliser
    made.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("[INST]/:\nA!"),
    )
    made.train_from_iterator(CORPUS * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


@pytest.mark.parametrize("template", [INST, LINES], ids=["inst", "lines"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reply", ["Sure, here is", "I cannot help"])
def test_a_reply_is_the_tokens_that_follow_the_prompt_in_one_text(style, template, reply):
    tokenizer = sentencepiece_like(style, template)
    (found,) = tokenise([Row("0", "please tell me", (reply,))], tokenizer, 500)
    chat = [
        {"role": "user", "content": "please tell me"},
        {"role": "assistant", "content": reply},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = [*found.prompt, *found.completions[0]]
    assert own == whole[: len(own)]
    asked = chat_text(tokenizer, "please tell me")
    assert list(found.prompt) == tokenizer(asked, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("style", STYLES)
def test_what_follows_a_prefill_is_tokenised_behind_it(style):
    tokenizer = sentencepiece_like(style, INST)
    row = Row("0", "please tell me", ("Sure, here is how",))
    (plain,) = tokenise([row], tokenizer, 500)
    (filled,) = tokenise([row], tokenizer, 500, prefill="Sure, here")
    whole = (*plain.prompt, *plain.completions[0])
    assert (*filled.prompt, *filled.completions[0]) == whole
    assert len(filled.prompt) > len(plain.prompt)


def test_a_reply_that_changes_the_prompts_tokens_is_an_error_that_names_the_row():
    corpus = ["assistant\n\n\nSure", "user\n\nplease"] * 50
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split("never", "isolated")
    alphabet = sorted(set("".join(corpus)) | set("</s>Xyzwq1IthaNo."))
    made.train_from_iterator(corpus, trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=80))
    template = "{% for m in messages %}{{m.role}}\n\n{{m.content}}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n\n{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)
    with pytest.raises(ValueError, match="row 'r7': the completion's beginning changes the tokens"):
        tokenise([row("please", "\nSure", "\nSure")], tokenizer, 500)


TURN = "<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n"
FAMILIES = {
    # name: (template, what the prompt ends in, what a reply ends in)
    "chatml": (
        "{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    # an empty thought before the last reply, which the generation prompt leaves to the model
    "qwen3": (
        "{% for m in messages %}<|im_start|>{{m.role}}\n{% if m.role == 'assistant' %}<think>\n\n"
        "</think>\n\n{% endif %}{{m.content}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    # the generation prompt opens a thought, which the written chat has not
    "r1": (
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{m.content}}{% else %}"
        "<|Assistant|>{{m.content}}<|eos|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|Assistant|><think>\n\n</think>\n\n",
        "<|eos|>",
    ),
    # a channel that the generation prompt does not name
    "harmony": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant<|channel|>final"
        "<|message|>{{m.content}}<|return|>{% else %}<|start|>user<|message|>{{m.content}}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "without a generation prompt": (
        "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}",
        "assistant: ",
        "</s>",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_before_every_reply_belongs_to_the_prompt(tokenizer, family):
    template, before, after = FAMILIES[family]
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    (found,) = tokenise([row("Bake bread?", "Sure, bake", "No.")], other, 500)
    assert text_of(other, found.prompt).endswith("Bake bread?" + between(template) + before)
    replies = [text_of(other, ids) for ids in found.completions]
    assert replies == ["Sure, bake" + after, "No." + after]


def between(template: str) -> str:
    """What ends the user's turn."""
    ends = {"<|im_end|>": "<|im_end|>\n", "<|User|>": "", "<|end|>": "<|end|>"}
    return next((end for mark, end in ends.items() if mark in template), "\n")


def test_an_unfinished_thought_has_said_nothing():
    assert behind_thoughts("I can not.") == "I can not."
    assert behind_thoughts("<think>\nhm\n</think>\n\nNo.") == "No."
    assert behind_thoughts("hm\n</think>\n\nNo.") == "No."
    assert behind_thoughts("<think>\nI will not") is None
    assert behind_thoughts("<think>a</think> so <think> b") is None


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}[{{m.role}}]{{m.content}}{% endfor %}[assistant]"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "{{ raise_exception('no earlier turns') }}{% endif %}[{{m.role}}]{{m.content}}{% endfor %}"
)
BROKEN = "{{ messages[0].content.nothing.here }}"


@pytest.mark.parametrize(
    ("template", "options", "reason"),
    [
        (NO_SYSTEM, {"system_prompt": "Be kind."}, "cannot write a system message .*not supported"),
        (NO_SYSTEM, {"system_prompt": "Be kind."}, r"leave out data\.system_prompt"),
        (ALTERNATING, {"shots": [("a", "b")]}, "cannot write earlier turns .*many-shot"),
        (BROKEN, {}, "cannot write a plain request"),
    ],
)
def test_what_a_template_refuses_is_named(tokenizer, template, options, reason):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(ValueError, match=reason):
        tokenise([row()], other, 200, **options)


DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '. ' }}" + TEMPLATE


def test_a_template_writes_the_day_of_the_run_on_every_day(tokenizer):
    day = datetime.date(2020, 2, 29)
    fixed = templated(with_template(tokenizer, DATED), {}, day)
    assert chat_text(fixed, "a").startswith("Today: 29 Feb 2020. ")
    free = chat_text(templated(with_template(tokenizer, DATED), {}, None), "a")
    assert datetime.date.today().strftime("%d %b %Y") in free


@pytest.mark.parametrize(
    "asks",
    [
        "{% set written = '%d %b' %}{{ strftime_now(written) }}",
        "{{ strftime_now('%d' + ' %b') }}",
        "{{ strftime_now (format='%d %b') }}",
        "{% set now = strftime_now %}{{ now('%d %b') }}",
    ],
)
def test_the_day_is_fixed_however_a_template_asks_for_it(tokenizer, asks):
    for template in (asks + TEMPLATE, {"default": asks + TEMPLATE, "tool_use": TEMPLATE}):
        fixed = templated(with_template(tokenizer, template), {}, datetime.date(2020, 2, 29))
        expected = chat_text(with_template(tokenizer, "29 Feb" + TEMPLATE), "a")
        assert chat_text(fixed, "a") == expected


def test_a_template_gets_its_arguments(tokenizer):
    template = TEMPLATE + "{% if enable_thinking is false %}<think></think>{% endif %}"
    plain = with_template(tokenizer, template)
    assert not chat_text(plain, "a").endswith("<think></think>")
    without = templated(with_template(tokenizer, template), {"enable_thinking": False}, None)
    assert chat_text(without, "a").endswith("<think></think>")


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other
