"""The page that runs a model: its engine in Node against Python, and the page in a browser."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TEXT, Page, perturbed

from gpt_lightning import BigramConfig, GPTConfig, LectureConfig, Sampling, TextGenerator
from gpt_lightning.checkpoint import KEY, describe, read_checkpoint, write_model_file
from gpt_lightning.cli import main
from gpt_lightning.data.bpe import BPETokenizer
from gpt_lightning.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt_lightning.data.words import WordTokenizer
from gpt_lightning.errors import UserError
from gpt_lightning.export.html import PAGE, Rung, export_html, pack
from gpt_lightning.generation.scoring import predictions
from gpt_lightning.model import build_model, num_parameters

NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
needs_node = pytest.mark.skipif(NODE is None, reason="no Node on this machine")
CHARACTERS = CharTokenizer("".join(sorted(set(TEXT))))
B, V = 32, CHARACTERS.vocab_size
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 24, "vocab_size": V, "block_size": B}
PARTS = ("scaled", "residual", "proj", "norm", "bias")
CONFIGS = {
    "gpt": GPTConfig(**SIZES),
    "gpt with long n-grams": GPTConfig(**SIZES, n_gram=6),
    "lecture": LectureConfig(**SIZES),
    "lecture without its parts": LectureConfig(**SIZES, ffwd=0, **dict.fromkeys(PARTS, False)),
    "lecture with gelu": LectureConfig(**SIZES, activation="gelu", qkv_bias=True),
    "lecture with gelu_tanh": LectureConfig(**SIZES, activation="gelu_tanh"),
    "bigram": BigramConfig(vocab_size=V, block_size=B),
}
# Runs the engine of a page, without its worker, and code after it.
DRIVER = """
const html = require("fs").readFileSync(process.argv[2], "utf8");
const part = id => html.match(new RegExp(`<script[^>]* id="${id}">([^]*?)</script>`))[1];
const bytes = Uint8Array.from(Buffer.from(part("weights"), "base64"));
Object.assign(globalThis, { self: {}, postMessage() {}, weights: bytes.buffer });
globalThis.description = JSON.parse(part("description"));
const start = part("engine") + ";receive.load({ description, weights });";
console.log(JSON.stringify((0, eval)(start + process.argv[3])));
"""


def model_of(config):
    """A model with weights that fp16 holds exactly."""
    torch.manual_seed(0)
    model = perturbed(build_model(config))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half())
    return model


def checkpoint_of(model, tokenizer=CHARACTERS, name="text.txt"):
    corpus = {"name": name, "sha256": "", "split": "tail", "val_fraction": 0.1}
    weights = {f"net.{key}": weight for key, weight in model.state_dict().items()}
    entry = describe(model.config, tokenizer.state(), corpus, {})
    callbacks = {
        "TrainingMetrics": {"val_losses": {5: 2.5, 10: 1.25}, "floor": 0.5},
        "GenerateText": {"samples": {4: "Tx <b>", 7: "To b", 10: "To be"}},
    }
    return {KEY: entry, "global_step": 10, "state_dict": weights, "callbacks": callbacks}


@pytest.fixture
def export(tmp_path):
    """Write the page of a model: `export(model, precision="fp16")` returns its file."""

    def write(model, tokenizer=CHARACTERS, precision="fp32", name="text.txt"):
        out = tmp_path / "page.html"
        export_html(Path("best.ckpt"), checkpoint_of(model, tokenizer, name), out, precision)
        return out

    return write


def javascript(page, code):
    """The value of an expression after the engine of a page."""
    command = [NODE, "-e", DRIVER, "node", str(page), code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def generated(page, prompt, max_new_tokens, temperature=1.0, top_k=0, seed=1337):
    """The cells of a prompt and its continuation."""
    request = {"from": 0, "max_new_tokens": max_new_tokens, "seed": seed}
    request["sampling"] = {"temperature": temperature, "top_k": top_k}
    ids = f"tokenizer.encode({json.dumps(prompt)}).ids"
    code = f"[...cells(steps({{ids: {ids}, ...{json.dumps(request)}}}))].filter(Boolean)"
    return javascript(page, code)


@needs_node
@pytest.mark.parametrize("length", [1, 20, 50])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_model(config, length, export):
    model = model_of(config)
    ids = CHARACTERS.encode(TEXT)[:length].tolist()[-B:]
    first = len(ids) // 2
    rows = javascript(
        export(model, precision="fp16"),
        f"const ids = {ids}, cache = new KVCache(model.config), parts = [];"
        f"if ({first}) parts.push(model.forward(ids.slice(0, {first}), cache, {first}));"
        f"parts.push(model.forward(ids, cache, {len(ids) - first}));"
        "parts.flatMap(part => [...part])",
    )
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    torch.testing.assert_close(torch.tensor(rows).view(-1, V), expected, rtol=1e-4, atol=1e-3)


@needs_node
@pytest.mark.parametrize("prompt", ["T", TEXT[: 2 * B]], ids=["short", "longer than block_size"])
@pytest.mark.parametrize("name", ["gpt", "lecture"])
@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(0.9), Sampling(1.3, top_k=3)], ids=str
)
def test_the_text_is_that_of_generate(name, sampling, prompt, export):
    model = model_of(CONFIGS[name])
    python = TextGenerator(model, CHARACTERS)
    text = python.generate(prompt, max_new_tokens=500, sampling=sampling, seed=5)[0]
    options = sampling.temperature, sampling.top_k or 0
    cells = generated(export(model), prompt, 500, *options, seed=5)
    assert "".join(cell["text"] for cell in cells) == text


@needs_node
@pytest.mark.parametrize("name", ["gpt", "lecture", "bigram"])
def test_costs_are_those_of_score(name, export):
    model, text = model_of(CONFIGS[name]), TEXT[: B + 1]
    cells = generated(export(model), text, 0)
    assert cells[0]["nats"] is None
    expected = TextGenerator(model, CHARACTERS).score(text).nats
    assert sum(cell["nats"] for cell in cells[1:]) == pytest.approx(expected, rel=1e-5)
    for cell in cells[1:]:
        probabilities = [p for _, _, p in cell["likeliest"]]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)


@needs_node
def test_costs_of_a_long_text_are_those_of_windows_a_quarter_of_block_size_apart(export):
    model, text = model_of(CONFIGS["gpt"]), TEXT[: 4 * B]
    cells = generated(export(model), text, 0)
    pieces = predictions(model, CHARACTERS.encode(text), [(0, len(text))], stride=B // 4)
    expected = torch.cat([torch.tensor(piece.nats) for piece in pieces])
    costs = torch.tensor([cell["nats"] for cell in cells[1:]])
    torch.testing.assert_close(costs, expected, rtol=1e-4, atol=1e-4)


@needs_node
def test_attention_and_layers_end_in_the_prediction(export):
    model, config = model_of(CONFIGS["lecture"]), CONFIGS["lecture"]
    ids = CHARACTERS.encode(TEXT)[:10].tolist()
    code = "const watch = {attention: [], logits: []}; const cache = new KVCache(model.config);"
    code += f"model.forward({ids}, cache, 1, watch);"
    code += "({attention: watch.attention.map(w => [...w]), logits: watch.logits.map(l => [...l])})"
    watch = javascript(export(model), code)
    x = (
        model.token_embedding_table(torch.tensor([ids]))
        + model.position_embedding_table.weight[:10]
    )
    block = model.blocks[0]
    q, k, _ = block.sa.heads(block.ln1(x))
    expected = block.sa.weights(q, k)[0, :, -1]  # (H, T)
    first = torch.tensor(watch["attention"][: config.n_head])
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert len(watch["attention"]) == config.n_layer * config.n_head
    lens = [model.lm_head(model.ln_f(x))[0, -1], model(torch.tensor([ids]))[0, -1]]
    assert len(watch["logits"]) == config.n_layer + 1
    for logits, expected in zip((watch["logits"][0], watch["logits"][-1]), lens, strict=True):
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-4)


@needs_node
def test_int8_weights_are_within_half_a_step_and_take_a_byte_each(export):
    sizes = {**SIZES, "n_embd": 128}
    model = perturbed(build_model(GPTConfig(**sizes)))
    page = export(model, precision="int8")
    name = "blocks.1.attn.qkv.weight"
    weight = model.state_dict()[name]
    found = torch.tensor(javascript(page, f"[...model.weights['{name}'].data]")).view_as(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((found - weight).abs() <= step * 0.51 + 127 * step * 2**-11).all()
    assert page.stat().st_size < 1.4 * num_parameters(model) + 60_000  # the engine and the page


@needs_node
def test_random_numbers_are_those_of_torch(export):
    page = export(model_of(CONFIGS["bigram"]))
    code = "const g = new Generator(1234567); Array.from({length: 2000}, () => g.uniform())"
    expected = torch.rand(2000, generator=torch.Generator().manual_seed(1234567))
    assert javascript(page, code) == expected.tolist()


UNICODE = "Não é 42 coisas; it's they'll 'tis\n\n  naïve — 漢字 🙂!\n"
TOKENIZERS = {
    "char": CharTokenizer("".join(sorted(set(TEXT + UNICODE)))),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.train([TEXT * 2 + UNICODE * 2], "".join(set(TEXT + UNICODE)), 200),
    "bpe": BPETokenizer.train([TEXT * 2 + UNICODE * 2], 400),
}


@needs_node
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_encode_as_in_python_and_cells_are_whole_characters(tokenizer, export):
    config = BigramConfig(vocab_size=tokenizer.vocab_size, block_size=B)
    cells = generated(export(build_model(config), tokenizer), UNICODE, 0)
    assert [i for cell in cells for i in cell["ids"]] == tokenizer.encode(UNICODE).tolist()
    assert "".join(cell["text"] for cell in cells) == UNICODE
    for cell in cells[1:]:
        assert cell["nats"] == pytest.approx(sum(cell["costs"])) and cell["nats"] > 0
    assert cells[0]["nats"] is None


@needs_node
def test_unknown_characters_are_left_out_and_named(export):
    page = export(model_of(CONFIGS["bigram"]))
    found = javascript(page, "const {ids, unknown} = tokenizer.encode('TéoZ'); [ids, [...unknown]]")
    assert found == [CHARACTERS.encode("To").tolist(), ["é", "Z"]]


def test_the_page_refers_to_nothing_outside_and_a_hostile_name_is_text(export):
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    file = export(model_of(CONFIGS["gpt"]), name=name)
    html = file.read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("script") == 4 and "img" not in page.tags
    assert page.texts["b"][0] == name
    assert {v for k, v in page.attributes if k in ("src", "href", "srcset", "action")} == {"data:,"}
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(|WebSocket", html)
    policy = next(v for _, v in page.attributes if v and "default-src" in v)
    assert "default-src 'none'" in policy


def test_the_page_of_a_rung_says_what_it_adds_and_links_to_the_pages_beside_it(tmp_path):
    links = {"previous": ("1 a.html", "Bigram"), "next": ("3_c.html", "C & <D>")}
    checkpoint = checkpoint_of(model_of(CONFIGS["bigram"]))
    rung = Rung("<One> head", "each position attends.", links)
    export_html(Path("last.ckpt"), checkpoint, tmp_path / "page.html", rung=rung)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.texts["h1"] == page.texts["title"]
    assert page.texts["h1"][0].startswith("<One> head: language model, ")
    assert page.texts["p"][0] == "Each position attends."
    assert page.texts["a"] == ["Previous: Bigram", "Next: C & <D>"]
    assert [v for k, v in page.attributes if k == "href"] == ["data:,", "1%20a.html", "3_c.html"]


def luminance(color):
    """Relative luminance, as WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_text_has_contrast_aa_on_every_color():
    css = (PAGE / "page.css").read_text(encoding="utf-8")
    themes = re.findall(r"--ink: (#\w+);([^}]*)", css)
    assert len(themes) == 2
    for ink, rest in themes:
        colors = re.findall(r"--c\d: (#\w+);", rest)
        assert len(colors) == 9
        for color in colors:
            low, high = sorted((luminance(color), luminance(ink)))
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_mistakes_are_users_errors_and_leave_no_file(export, tmp_path):
    model = model_of(CONFIGS["gpt"])
    with pytest.raises(UserError, match="precision=int4 must be one of int8, fp16, fp32"):
        export(model, precision="int4")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="precision=fp16 cannot hold lm_head.weight"):
        export(model, precision="fp16")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e7
    with pytest.raises(UserError, match="precision=int8 cannot hold lm_head.weight"):
        export(model, precision="int8")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        export(model)
    assert not list(tmp_path.iterdir())


@needs_node
def test_large_weights_are_packed_where_the_precision_holds_them(export):
    model = model_of(CONFIGS["lecture"])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 8e6  # in int8, the scale of its row is 63,000
        model.lm_head.bias[0] = 1e6  # vectors stay in fp32
    found = javascript(
        export(model, precision="int8"),
        "['weight', 'bias'].map(name => model.weights[`lm_head.${name}`].data[0])",
    )
    assert found == [pytest.approx(8e6, rel=1e-2), 1e6]


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_weights_without_numbers_are_packed(precision):
    model = torch.nn.ParameterDict({"a": torch.zeros(0, 3), "b": torch.zeros(3, 0)})
    described, _ = pack(model, precision)
    assert [entry["shape"] for entry in described] == [(0, 3), (3, 0)]


def test_the_page_of_a_safetensors_file_is_that_of_its_checkpoint(tmp_path):
    checkpoint = checkpoint_of(model_of(CONFIGS["bigram"]))
    write_model_file(tmp_path / "model.safetensors", checkpoint)
    for name, read in (
        ("ckpt", checkpoint),
        ("file", read_checkpoint(tmp_path / "model.safetensors")),
    ):
        export_html(Path("best.ckpt"), read, tmp_path / name)
    html = (tmp_path / "ckpt").read_text(encoding="utf-8")
    assert (tmp_path / "file").read_text(encoding="utf-8") == html
    run = json.loads(Page(html).script("description"))["run"]
    assert run["losses"] == [[5, 2.5], [10, 1.25]] and run["floor"] == 0.5
    assert run["samples"] == [[4, "Tx <b>"], [7, "To b"], [10, "To be"]]


@pytest.mark.parametrize(
    "history",
    [
        None,
        "text",
        {"val_losses": None},
        {"val_losses": [[1, 2, 3]]},
        {"val_losses": [[float("inf"), 1.0]]},
        {"samples": {"a": "b"}},
        {"floor": "<b>"},
    ],
    ids=str,
)
def test_a_damaged_history_is_a_users_error(history, tmp_path):
    checkpoint = {**checkpoint_of(model_of(CONFIGS["bigram"])), "history": history}
    with pytest.raises(UserError, match="ckpt_path=best.ckpt: the history of its run is damaged"):
        export_html(Path("best.ckpt"), checkpoint, tmp_path / "page.html")


def test_numbers_that_are_not_finite_and_folders_of_the_corpus_are_not_on_the_page(tmp_path):
    history = {"val_losses": [[1, float("nan")], [2, 1.5]], "floor": float("nan")}
    file = str(tmp_path / "book.txt")
    checkpoint = {**checkpoint_of(model_of(CONFIGS["bigram"]), name=file), "history": history}
    export_html(Path("best.ckpt"), checkpoint, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.texts["b"][0] == "book.txt"
    run = json.loads(page.script("description"))["run"]
    assert (run["losses"], run["floor"]) == ([[2, 1.5]], None)


def test_the_command_on_the_page_repeats_the_run(trained, tmp_path, monkeypatch):
    checkpoint = trained / "lightning_logs/version_0/checkpoints/last.ckpt"
    first = read_checkpoint(checkpoint)
    export_html(checkpoint, first, tmp_path / "page.html")
    run = json.loads(
        Page((tmp_path / "page.html").read_text(encoding="utf-8")).script("description")
    )["run"]
    losses = first["callbacks"]["TrainingMetrics"]["val_losses"]
    assert run["losses"] == [[step, loss] for step, loss in losses.items()] and losses
    program, command = shlex.split(run["command"])[:3], shlex.split(run["command"])[3:]
    assert program == ["python", "-m", "gpt_lightning"]
    shutil.rmtree(trained / "lightning_logs")
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0
    second = read_checkpoint(checkpoint)["state_dict"]
    assert all(torch.equal(weight, second[name]) for name, weight in first["state_dict"].items())


@pytest.fixture
def open_page(export):
    """Open the page of a model in a browser; at the end, it had no errors and sent no requests."""
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        requests, errors = [], []

        def open_(model, width=1280, tokenizer=CHARACTERS, **options):
            page = browser.new_page(viewport={"width": width, "height": 700}, **options)
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(export(model, tokenizer).as_uri())
            page.locator("#status", has_text="a second").wait_for()
            return page

        yield open_
        browser.close()
    assert errors == []
    assert [url.split(":")[0] for url in requests] == ["file", "blob"]


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def shown_text(page):
    return "".join(page.locator("#text span").all_text_contents()).replace("↵", "")


def token_shown(page, number):
    """The text of an alternative of the chosen character."""
    label = page.locator("#details li b").nth(number).inner_text()
    return {"space": " ", "line end": "\n"}.get(label, label)


def tab_to(page, name):
    """Press Tab until the element of this id has the focus; it starts again after the last."""
    for _ in range(60):
        if page.evaluate("document.activeElement.id") == name:
            return
        press(page, "Tab")
    raise AssertionError(f"Tab does not reach {name}")


def test_everything_works_with_the_keyboard_alone(open_page):
    model = model_of(CONFIGS["gpt"])
    page, python = open_page(model, color_scheme="dark"), TextGenerator(model, CHARACTERS)
    assert len(shown_text(page)) == 301  # it begins by itself
    tab_to(page, "prompt")
    page.keyboard.type("To be")
    tab_to(page, "temperature")
    press(page, "Control+a")
    page.keyboard.type("0.8")
    tab_to(page, "length")
    press(page, "Control+a")
    page.keyboard.type("80")
    tab_to(page, "generate")
    press(page, "Enter")
    page.locator("#status", has_text="85 characters").wait_for()
    text = python.generate("To be", max_new_tokens=80, sampling=Sampling(0.8))[0]
    assert shown_text(page) == text
    tab_to(page, "text")
    press(page, "Home", *["ArrowRight"] * 8)
    details = page.locator("#details")
    assert details.inner_text().startswith(text[8] if text[8] > " " else ("space", "line end"))
    branch = text[:8] + token_shown(page, 1)
    press(page, "2")
    page.locator("#status", has_text="89 characters").wait_for()
    assert shown_text(page) == python.generate(branch, max_new_tokens=80, sampling=Sampling(0.8))[0]
    assert page.locator("#layers tr").count() == SIZES["n_layer"] + 1
    tab_to(page, "colors")
    press(page, "ArrowDown")
    tab_to(page, "head")
    press(page, "ArrowDown")
    page.locator("#text .c8").wait_for()
    assert page.locator("#legend").inner_text().startswith("Attention")


def test_a_phone_shows_the_page_without_a_sideways_scroll(open_page):
    page = open_page(model_of(CONFIGS["lecture"]), width=360, is_mobile=True, has_touch=True)
    page.fill("#prompt", TEXT[:60] + "Z")
    page.locator("#score").tap()
    page.locator("#status", has_text="60 characters").wait_for()
    assert shown_text(page) == TEXT[:60]
    assert page.locator("#unknown").inner_text().endswith("vocabulary: Z")
    page.locator("#text span").nth(3).tap()
    page.locator("#details button").nth(0).tap()
    page.locator("#status", has_text="304 characters").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_stop_ends_a_text_and_continue_adds_to_it(open_page):
    page = open_page(model_of(CONFIGS["gpt"]))
    page.fill("#length", "100000")
    page.click("#generate")
    page.locator("#text span").nth(50).wait_for()
    page.click("#stop")
    page.locator("#status", has_text="a second").wait_for()
    count = len(shown_text(page))
    assert count < 100_000
    page.fill("#length", "10")
    page.click("#more")
    page.locator("#status", has_text=f"{count + 10:,} characters").wait_for()
    page.fill("#temperature", "-1")
    page.click("#generate")  # the browser names the wrong value
    assert len(shown_text(page)) == count + 10


def test_a_click_keeps_a_character_chosen_while_the_pointer_moves_to_an_alternative(open_page):
    page = open_page(model_of(CONFIGS["gpt"]))
    spans, chosen = page.locator("#text span"), page.locator("#text .on")

    def chosen_number():
        return page.evaluate("[...spans].findIndex(span => span.classList.contains('on'))")

    spans.nth(3).hover()
    assert chosen_number() == 3
    spans.nth(5).click()
    spans.nth(8).hover()
    assert chosen_number() == 5 and chosen.count() == 1
    before, alternative = shown_text(page)[:5], token_shown(page, 1)
    page.locator("#details button").nth(1).click()
    page.locator("#status", has_text="306 characters").wait_for()
    assert shown_text(page)[:6] == before + alternative


def test_with_reduced_motion_the_text_appears_at_once_and_a_bigram_has_no_layers(open_page):
    page = open_page(model_of(CONFIGS["bigram"]), reduced_motion="reduce")
    assert len(shown_text(page)) == 301
    assert not page.locator("#inside").is_visible() and not page.locator("#colors").is_visible()


def test_the_slider_shows_the_samples_through_training_with_their_losses(open_page):
    page = open_page(model_of(CONFIGS["bigram"]), width=360)
    sample, shown = page.locator("#sample"), page.locator("#shown")
    assert (sample.inner_text(), shown.inner_text()) == (
        "To be",
        "Step 10, validation loss 1.2500 nats (1.80 bits)",
    )
    tab_to(page, "step")
    press(page, "ArrowLeft")
    assert sample.inner_text() == "To b"
    assert shown.inner_text() == "Step 7, validation loss 2.5000 nats (3.61 bits) at step 5"
    press(page, "Home")
    assert (sample.inner_text(), shown.inner_text()) == ("Tx <b>", "Step 4")
    assert page.get_by_role("slider").get_attribute("aria-valuetext") == "Step 4"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_known_entropy_stands_beside_the_costs(open_page):
    page = open_page(model_of(CONFIGS["gpt"]))
    assert (
        page.locator("#status")
        .inner_text()
        .endswith("Entropy of the corpus: 0.500 nats (0.72 bits).")
    )
    page.locator("#text span").nth(5).click()
    assert page.locator("#details p").inner_text().endswith("; entropy 0.72 bits per character")
    assert "0.5000 nats (0.72 bits)" in page.locator("#figures").inner_text()
    assert page.locator("#losses .floor").count() == 1


def test_a_character_of_several_tokens_shows_the_cost_of_each(open_page):
    tokenizer = ByteTokenizer()
    config = BigramConfig(vocab_size=tokenizer.vocab_size, block_size=B)
    page = open_page(build_model(config), tokenizer=tokenizer)
    page.fill("#prompt", "a\N{BEETLE}b")
    page.click("#score")
    page.locator("#status", has_text="3 characters").wait_for()
    page.locator("#text span").nth(1).click()
    details = page.locator("#details p").inner_text()
    total, *parts = map(
        float, re.findall(r"([\d.]+) bits[),;]", details.split("; entropy")[0] + ";")
    )
    assert re.findall(r"\\x\w\w", details) == [r"\xf0", r"\x9f", r"\xaa", r"\xb2"]
    assert len(parts) == 4 and sum(parts) == pytest.approx(total, abs=0.03)


def test_a_character_that_nothing_precedes_has_no_cost_layers_or_attention(open_page):
    page = open_page(model_of(CONFIGS["gpt"]))
    page.select_option("#colors", "attention")
    colored, spans = page.locator("#text span:not(.c0)"), page.locator("#text span")
    spans.nth(5).click()
    colored.first.wait_for()
    assert page.locator("#layers tr").count() == SIZES["n_layer"] + 1
    spans.nth(0).click()
    assert page.locator("#details p").inner_text().endswith("not predicted")
    assert colored.count() == page.locator("#layers tr").count() == 0
    page.fill("#prompt", "T")
    page.click("#score")
    page.locator("#status", has_text="1 character, ").wait_for()
    assert page.locator("#status").inner_text().endswith("Nothing precedes it, so it has no cost.")


def test_a_copied_text_has_no_marks(open_page):
    text = "To\tbe\n\nor \N{HEBREW LETTER ALEF}\n"
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    config = BigramConfig(vocab_size=tokenizer.vocab_size, block_size=B)
    page = open_page(build_model(config), tokenizer=tokenizer)
    page.fill("#prompt", text)
    page.click("#score")
    page.locator("#status", has_text=f"{len(text)} characters").wait_for()
    assert page.locator("#text").inner_text().startswith("To⇥\tbe↵\n↵\nor ")
    page.locator("#text span").nth(2).click()
    assert page.locator("#details b").first.inner_text().strip() == "tab"
    copied = page.evaluate(
        """() => {
            getSelection().selectAllChildren(document.getElementById("text"));
            const event = new ClipboardEvent(
                "copy", { clipboardData: new DataTransfer(), bubbles: true });
            document.querySelector("#text span").dispatchEvent(event);
            return event.clipboardData.getData("text/plain");
        }"""
    )
    assert copied == text
