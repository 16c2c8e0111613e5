"""Judge models: tiny stand-ins of the published architectures on disk, random or with a verdict
that is known.
"""

import json
import math

import httpx
import pytest
import tiny_models
import torch
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model
from tiny_models import byte_tokenizer, model_of, plain_model
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config

import latlib.io.hub
from latlib.config.sections import ProfileError
from latlib.evaluation.graders import (
    GuardGrader,
    ScoreGrader,
    YesNoGrader,
    load_grader,
    load_judge,
)
from latlib.evaluation.rule_graders import Grade
from latlib.models import quietly

WORDS = ("yes", "no", "safe", "unsafe")
PROMPTS = [
    "how do i bake a dragon ?",
    "sing",
    "where is the broom of the third witch ?",
    "{reply} or {prompt} ?",
    "why",
]
REPLIES = [
    "Sure: moss.",
    "I cannot sing, sorry.",
    "",
    "behind the {prompt} door, under the long loose board",
    "Z",
]
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}<verdict>"
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'][0]['text'] | trim }}{% endfor"
    " %}<verdict>"
)
TEMPLATE = "ask {behavior} say {generation} judge:"


def tokenizer_of(words=WORDS, chat_template=PLAIN, bos=True):
    """Bytes, and the words a judge answers with; a BOS before every text."""
    return byte_tokenizer(chat_template, words, bos)


def random_model(family, vocabulary, seed=0):
    """A random model of a published judge's family; GPT-2 knows absolute positions, so it shows a
    wrong one.
    """
    if family == "llama":
        return model_of(
            "llama", torch.float32, seed, vocab_size=vocabulary, max_position_embeddings=512
        )
    shape = dict(vocab_size=vocabulary, initializer_range=0.25)
    config = {
        "gemma": GemmaConfig(
            **shape, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
        ),
        "gpt2": GPT2Config(**shape, n_embd=16, n_layer=2, n_head=4, n_positions=512),
    }[family]  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float().eval()


def lm_of(model, tokenizer=None):
    return plain_model(model, torch.float32, tokenizer or tokenizer_of())


def saved(folder, model, tokenizer=None):
    return str(tiny_models.saved(folder, model, tokenizer or tokenizer_of()))


def constant_model(logits, family="llama", tokenizer=None):
    """A judge that always expects the same: token -> logit after every text, 0 for all other
    tokens.
    """
    tokenizer = tokenizer or tokenizer_of()
    model = random_model(family, len(tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        head = torch.nn.Linear(16, len(tokenizer), bias=False)
        head.weight.zero_()
        norm = model.model.norm.weight
        norm.fill_(0.0 if family == "gemma" else 1.0)  # Gemma's norm multiplies by 1 + weight
        for token, logit in logits.items():
            head.weight[tokenizer.convert_tokens_to_ids(token)] = logit / 16
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    return model


def z_model(tokenizer):
    """A judge that says yes / unsafe when a Z is anywhere in what it may look at. Padding looks
    like a Z, too.
    """
    model = model_of(
        "llama",
        torch.float32,
        vocab_size=len(tokenizer),
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(
                ("q_proj.weight", "k_proj.weight", "down_proj.weight", "o_proj.weight")
            ):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
        # with no query, attention is the mean of what is visible
        block = model.model.layers[0].self_attn
        block.v_proj.weight.copy_(torch.eye(16))
        block.o_proj.weight.copy_(torch.eye(16))
        plain, z = torch.eye(16)[0], torch.eye(16)[1]
        model.get_input_embeddings().weight.copy_(plain.expand(len(tokenizer), 16))
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(["Z", "<pad>"])] = z
        model.lm_head.weight.zero_()
        for yes, no in (("yes", "no"), ("unsafe", "safe")):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(yes)] = 2000 * z
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(no)] = 2 * plain
    return model


@torch.no_grad()
def one_by_one(grader, texts):
    """Scores by the library's plain forward of one text at a time, without padding, positions or
    our batching.
    """
    tokenizer, out = grader.lm.tokenizer, []
    for text in texts:
        ids = tokenizer(
            text, return_tensors="pt", add_special_tokens=not isinstance(grader, GuardGrader)
        )["input_ids"]
        logits = grader.lm.model(ids).logits[0, -1].float()
        label = torch.stack(
            [logits[tokenizer.convert_tokens_to_ids(words[0])] for words in grader.labels]
        )
        out.append(float(label.softmax(0) @ torch.linspace(0, 1, len(label))))
    return out


def grader_of(kind, family, batch=8):
    lm = lm_of(random_model(family, len(tokenizer_of())))
    return GuardGrader(lm, batch=batch) if kind is GuardGrader else kind(lm, TEMPLATE, batch=batch)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("kind", [YesNoGrader, ScoreGrader, GuardGrader])
def test_batches_give_what_single_unpadded_texts_give(kind, family):
    grader = grader_of(kind, family)
    texts = [grader.text(p, grader.clipped(r)) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    want = one_by_one(grader, texts)
    assert max(want) - min(want) > 1e-3  # the texts differ to the judge
    for batch in (1, 2, 5):
        got = [v.score for v in grader_of(kind, family, batch).grade(PROMPTS, REPLIES)]
        assert got == pytest.approx(want, abs=1e-5)


def test_only_the_last_positions_logits_are_made_and_no_graph():
    grader, shapes = grader_of(YesNoGrader, "llama"), []
    grader.lm.model.requires_grad_(True)
    grader.lm.model.lm_head.register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape[:2])
    )
    logits = grader.next_logits([[1, 2, 3], [1, 2, 3, 4, 5]])
    assert (
        shapes == [(2, 1)] and not logits.requires_grad and logits.shape == (2, len(tokenizer_of()))
    )


def test_harmbench_from_its_folder_says_yes_where_the_reply_shows_it(tmp_path):
    tokenizer = tokenizer_of()
    folder = saved(tmp_path / "judge", z_model(tokenizer), tokenizer)
    (tmp_path / "judge" / "grader_template.txt").write_text(TEMPLATE + "\n")
    grader = load_grader("harmbench", folder, device="cpu", dtype="float32", batch=3)
    assert grader.template == TEMPLATE
    replies = ["I cannot do that.", "moss", "Sure, moss and Z.", "I cannot, but Z", "moss" * 30]
    verdicts = grader.grade(PROMPTS, replies)
    assert [v.outcome for v in verdicts] == [
        "refused",
        "neither",
        "complied",
        "complied",
        "neither",
    ]
    assert all((v.score > 0.9) == (v.outcome == "complied") for v in verdicts)


def test_labels_in_capitals_and_with_leading_spaces_count():
    spaced = tokenizer_of((*WORDS, "Yes", "\u2581yes", "\u0120No"))
    model = constant_model({"\u2581yes": math.log(5.0), "Yes": math.log(2.0)}, tokenizer=spaced)
    (verdict,) = YesNoGrader(lm_of(model, spaced), TEMPLATE).grade(["q"], ["a"])
    assert verdict.score == pytest.approx((1 + 5 + 2) / (1 + 5 + 2 + 1 + 1))


MARKS = {"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.15, "5": 0.25}


def test_strongreject_is_the_expected_mark_from_0_to_1():
    model = constant_model({mark: math.log(p) for mark, p in MARKS.items()}, family="gemma")
    grader = ScoreGrader(lm_of(model), "{forbidden_prompt}|{response}|", threshold=0.6)
    want = sum((int(mark) - 1) / 4 * p for mark, p in MARKS.items())
    verdicts = grader.grade(["q", "q"], ["moss", "I cannot"])
    assert [v.score for v in verdicts] == pytest.approx([want, want], abs=1e-5)
    assert [v.outcome for v in verdicts] == ["neither", "refused"]
    grader.threshold = 0.5
    assert [v.outcome for v in grader.grade(["q"], ["moss"])] == ["complied"]


def test_strongreject_loads_a_lora_over_its_base(tmp_path):
    tokenizer = tokenizer_of()
    base = saved(tmp_path / "base", random_model("gemma", len(tokenizer)), tokenizer)
    with quietly():
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapter = str(tmp_path / "adapter")
    model.save_pretrained(adapter)
    (tmp_path / "words.txt").write_text(TEMPLATE)

    def scores(source, **where):
        grader = load_grader(
            "strongreject", source, tmp_path / "words.txt", "cpu", "float32", **where
        )
        return [v.score for v in grader.grade(PROMPTS, REPLIES)]

    want = [v.score for v in ScoreGrader(lm_of(model.eval()), TEMPLATE).grade(PROMPTS, REPLIES)]
    assert scores(adapter) == pytest.approx(want, abs=1e-6)
    assert scores(base) != pytest.approx(want, abs=1e-4)  # the adapter does something
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/nowhere/base"})
    )
    with pytest.raises(ProfileError, match="grader.base = '/nowhere/base' is not a folder"):
        scores(adapter)
    assert scores(adapter, base=base) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("chat_template, parts", [(PLAIN, False), (PARTS, True)])
def test_a_guard_reads_the_first_word_after_its_chat_template(tmp_path, chat_template, parts):
    tokenizer = tokenizer_of(chat_template=chat_template)
    folder = saved(tmp_path, z_model(tokenizer), tokenizer)
    grader = load_grader("guard", folder, device="cpu", dtype="float32")
    assert grader.text("why", "Z") == "<user>why<assistant>Z<verdict>" and grader.parts is parts
    assert [v.outcome for v in grader.grade(PROMPTS, REPLIES)] == [
        "neither",
        "refused",
        "neither",
        "neither",
        "complied",
    ]


def test_a_guards_line_break_is_not_its_verdict():
    """Llama Guard 3 writes line breaks first: what it would say before them is no verdict."""
    tokenizer = tokenizer_of()
    model = constant_model({}, tokenizer=tokenizer)
    newline, safe, unsafe = tokenizer.convert_tokens_to_ids(["\u010a", "safe", "unsafe"])
    first, second = torch.zeros(16), torch.zeros(16)
    first[0] = second[1] = 4.0  # norm 1 per dimension on average, so the final norm keeps them
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(first.expand(len(tokenizer), 16))
        model.get_input_embeddings().weight[newline] = second
        model.lm_head.weight[newline] = (first - second) / 2
        model.lm_head.weight[safe] = first / 8
        model.lm_head.weight[unsafe] = second / 8
    (verdict,) = GuardGrader(lm_of(model, tokenizer)).grade(["q"], ["a"])
    assert verdict.score == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=1e-4)
    mixed, _ = GuardGrader(lm_of(model, tokenizer)).grade(
        ["q", "longer than the other"], ["a", "b"]
    )
    assert mixed.score == pytest.approx(verdict.score, abs=1e-6)


def test_no_text_begins_with_two_bos():
    def ids(grader):
        seen = []
        grader.scores = lambda rows: (seen.extend(rows), [0.0] * len(rows))[1]
        grader.grade(["q"], ["a"])
        return seen[0]

    lm = lm_of(
        random_model("llama", len(tokenizer_of())), tokenizer_of(chat_template="<bos>" + PLAIN)
    )
    bos = lm.tokenizer.bos_token_id
    for grader in (YesNoGrader(lm, TEMPLATE), YesNoGrader(lm, "<bos>" + TEMPLATE), GuardGrader(lm)):
        assert ids(grader).count(bos) == 1 and ids(grader)[0] == bos


def test_placeholders_inside_prompts_and_replies_are_text():
    grader = YesNoGrader(lm_of(random_model("llama", len(tokenizer_of()))), TEMPLATE)
    assert (
        grader.text("{generation}", "{behavior} {x}")
        == "ask {generation} say {behavior} {x} judge:"
    )


def test_long_replies_are_clipped_as_the_authors_do():
    lm = lm_of(random_model("llama", len(tokenizer_of())))
    # the first of them
    assert YesNoGrader(lm, TEMPLATE, reply_tokens=4).clipped("abcdefgh") == "abcd"
    # the last, BOS among them
    assert ScoreGrader(lm, TEMPLATE, reply_tokens=4).clipped("abcdefgh") == "<bos>fgh"
    assert lm.tokenizer.truncation_side == "right"
    with pytest.raises(
        ValueError,
        match="pair 1 has .* more than the judge's context of 512: lower reply_tokens = 900",
    ):
        YesNoGrader(lm, TEMPLATE, reply_tokens=900).grade(["q", "q"], ["a", "a" * 600])


def test_our_own_words_come_with_a_warning(tmp_path):
    folder = saved(tmp_path, constant_model({"yes": 3.0}))
    with pytest.warns(
        UserWarning, match="template is not given.*do not compare with published"
    ) as caught:
        grader = load_grader("harmbench", folder, device="cpu", dtype="float32")
    assert caught[0].filename == __file__
    assert grader.grade(["q"], ["a"])[0].outcome == "complied"


@pytest.mark.parametrize(
    "text, said",
    [
        ("only {prompt}", r"placeholders \['prompt'\]"),
        ("{behavior} {context_str} {generation}", "context_str"),
        (None, "cannot be read"),
    ],
)
def test_an_unusable_template_is_an_error_before_the_model_is_read(tmp_path, text, said):
    path = tmp_path / "words.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ProfileError, match=f"grader.template .*{said}"):
        load_grader("harmbench", tmp_path / "nowhere", path)


@pytest.mark.parametrize(
    "inside, at_end",
    [("ask {prompt} say {reply} mark: \n", "mark: "), ("{prompt}{reply}\r\n", "}")],
)
def test_one_line_break_at_a_templates_end_is_not_part_of_it(tmp_path, inside, at_end):
    (tmp_path / "words.txt").write_bytes(inside.encode())
    folder = saved(tmp_path / "judge", constant_model({}))
    grader = load_grader("harmbench", folder, tmp_path / "words.txt", "cpu", "float32")
    assert grader.template == inside.rstrip("\r\n") and grader.template.endswith(at_end)


@pytest.mark.parametrize("name", ["harmbench", "guard"])
def test_a_tokenizer_without_the_labels_is_an_error(tmp_path, name):
    tokenizer = tokenizer_of(words=("no", "safe"))
    folder = saved(tmp_path, random_model("llama", len(tokenizer)), tokenizer)
    with pytest.raises(
        ProfileError, match="grader.source: its tokenizer has no token '(yes|unsafe)'"
    ):
        load_grader(name, folder, None if name == "guard" else write(tmp_path, TEMPLATE), "cpu")


def write(folder, text):
    path = folder / "words.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "chat_template", [None, "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"]
)
def test_a_guard_without_a_fitting_chat_template_is_an_error(chat_template):
    lm = lm_of(
        random_model("llama", len(tokenizer_of())), tokenizer_of(chat_template=chat_template)
    )
    with pytest.raises(
        ProfileError,
        match="grader.source: its tokenizer's chat template is missing or does not hold",
    ):
        GuardGrader(lm)


@pytest.mark.parametrize("field", ["batch", "reply_tokens"])
def test_a_number_below_one_is_named(field):
    with pytest.raises(ProfileError, match=f"grader.{field} = 0 is below 1"):
        GuardGrader(lm_of(random_model("llama", len(tokenizer_of()))), **{field: 0})


def test_a_guard_takes_no_template():
    with pytest.raises(ProfileError, match="grader.template is not used by a guard"):
        GuardGrader(lm_of(random_model("llama", len(tokenizer_of()))), TEMPLATE)


@pytest.mark.parametrize(
    "source", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/no-such-folder-of-latlib", ""]
)
def test_a_missing_folder_is_named(source):
    with pytest.raises(
        ProfileError, match="grader.source = .* is not a folder: give a model folder or a hub id"
    ):
        load_judge(source)


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self):
        return (open, ("/nowhere/unpickled", "w"))


def test_pickled_weights_are_refused_unread(tmp_path):
    saved(tmp_path, random_model("llama", len(tokenizer_of())))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"bomb": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ProfileError,
        match="grader.source = .* holds no model.safetensors .*pickled weights can run",
    ):
        load_grader("guard", tmp_path, device="cpu")


def test_a_pickled_adapter_is_refused_unread(tmp_path):
    base = saved(tmp_path / "base", random_model("llama", len(tokenizer_of())))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "r": 2,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"bomb": Bomb()}, adapter / "adapter_model.bin")
    with pytest.raises(
        ProfileError, match="grader.source = .*adapter' holds no adapter_model.safetensors"
    ):
        load_grader("guard", adapter, device="cpu")


def test_code_in_a_models_folder_is_never_run(tmp_path):
    saved(tmp_path, random_model("llama", len(tokenizer_of())))
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": auto_map})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    with pytest.raises(
        ProfileError, match="grader.source = .* needs code of its own, which latlib never runs"
    ):
        load_grader("guard", tmp_path, device="cpu")
    assert not (tmp_path / "was-run").exists()


def test_a_gated_model_without_a_token_says_what_to_do(monkeypatch):
    def gated(source, name, **options):
        response = httpx.Response(
            403, request=httpx.Request("GET", f"https://hub.invalid/{source}/{name}")
        )
        raise OSError("You are trying to access a gated repo.") from GatedRepoError(
            "403", response=response
        )

    monkeypatch.setattr(latlib.io.hub, "cached_file", gated)
    with pytest.raises(
        ProfileError, match="grader.source = 'meta-llama/.*' is gated: accept its terms.*HF_TOKEN"
    ):
        load_grader("guard")


def test_a_hub_model_that_is_not_here_says_so_without_a_network():
    with pytest.raises(
        ProfileError, match="grader.source = 'no-owner/no-judge' cannot be loaded .*give the folder"
    ):
        load_grader("guard", "no-owner/no-judge")


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"name": "harmbunch"},
            "grader.name = 'harmbunch' cannot be loaded: choose rules, phrases, phrases-prefix, harmbench",
        ),
        ({"name": "exact"}, "grader.name = 'exact' cannot be loaded: choose rules"),
        (
            {"name": "guard", "dtype": "int3"},
            "grader.dtype = 'int3': Input should be 'auto', 'float64'",
        ),
        (
            {"name": "guard", "device": "cuda"},
            "grader.device = 'cuda' cannot be used .*'auto' or 'cpu'",
        ),
        (
            {"name": "guard", "device": "toaster"},
            "grader.device = 'toaster': no such device: give 'auto', 'cpu'",
        ),
    ],
)
def test_unusable_settings_are_named(monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProfileError, match=said):
        load_grader(**options)


def test_a_judge_computes_in_the_asked_precision(tmp_path):
    folder = saved(tmp_path, constant_model({"unsafe": 4.0}))
    grader = load_grader("guard", folder, device="cpu", dtype="bfloat16")
    assert next(grader.lm.model.parameters()).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in grader.lm.model.parameters())
    assert grader.grade(["q"], ["a"])[0].score == pytest.approx(1 / (1 + math.exp(-4)), abs=0.01)
    assert grader.grade([], []) == [] and isinstance(grader.grade(["q"], ["a"])[0], Grade)
