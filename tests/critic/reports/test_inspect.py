"""The page of `lambda-critic inspect`: its numbers, and what it does in a browser."""

import json
import re
import shutil

import pytest
import torch
from critic_testing import batch_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.evaluation.credit import Credit, assign_credit, value_changes
from lambda_return_ext.critic.reports.inspection import first_difference, largest_drops, render_page, token_texts
from lambda_return_ext.reference import compute_lambda_return as reference_return

HOSTILE = [
    "</script><script>window.bad=1</script>",
    "<img src=x onerror=window.bad=1>",
    "&lt;b&gt;",
    "\"'\\\u2028",
    "a\n\tb",
]


def page_data(path):
    """What the page at `path` holds."""
    content = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', content, re.S)[1])


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_credit_is_the_target_the_advantage_and_the_one_step_error():
    torch.manual_seed(0)
    values, mask = torch.rand(3, 7), torch.rand(3, 7) > 0.4
    rewards = torch.tensor([1.0, 0.0, 1.0])
    poisoned = values.masked_fill(~mask, float("nan"))
    credit = assign_credit(poisoned, batch_of(mask, mask, rewards), 0.9, 0.8)
    torch.testing.assert_close(credit.targets, reference_return(values, rewards, mask, 0.9, 0.8))
    torch.testing.assert_close(credit.advantages, (credit.targets - values) * mask)
    for row in range(3):
        v = values[row][mask[row]]
        following = torch.cat([0.9 * v[1:], rewards[row : row + 1]])
        torch.testing.assert_close(credit.td_errors[row][mask[row]], following - v)
        assert not credit.td_errors[row][~mask[row]].any()


def test_drops_are_between_output_tokens_and_from_the_first_difference_on():
    values = torch.tensor([0.9, 0.2, 0.8, 0.0, 0.7, 0.6, 0.1, 0.1])
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]).bool()
    credit = Credit(mask, values, *[values] * 3)
    assert largest_drops(credit, 0) == [1, 6, 4]  # 0.7, 0.5, and 0.1 across the gap; 0.6 after 0.7 is less by rounding
    assert largest_drops(credit, 2) == [6, 4, 5]
    assert largest_drops(credit, 7) == []  # equal is no fall
    assert [first_difference((1, 2, 3), other) for other in ((1, 2, 4), (5,), (1, 2), (1, 2, 3, 4))] == [2, 0, 2, 3]


def test_token_texts_put_together_are_the_whole_text():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "if a:\n\treturn 'Größe \N{GREEK SMALL LETTER LAMDA} \N{SMILING FACE WITH SUNGLASSES}'"
    ids = tuple(fast(text)["input_ids"])
    texts = token_texts(fast, ids)
    assert len(texts) == len(ids) > len(text)  # every byte is a token
    assert "".join(texts) == text
    assert token_texts(fast, ids[:-3])[-1] == "\N{REPLACEMENT CHARACTER}"


def test_the_command_writes_the_page_of_a_run(config_file, tmp_path, capsys):
    assert main(["train", "--config", str(config_file)]) == 0
    run = tmp_path / "run"
    capsys.readouterr()
    assert main(["inspect", str(run), "--pairs", "5"]) == 0
    assert f"wrote {run / 'inspect.html'}: 5 pairs" in capsys.readouterr().out
    data = page_data(run / "inspect.html")
    assert len(data["pairs"]) == 5
    margins = [pair["margin"] for pair in data["pairs"]]
    assert margins == sorted(margins)
    for pair in data["pairs"]:
        assert pair["right"]["t"][pair["differs"]] == "fine"
        assert pair["wrong"]["t"][pair["differs"]] == "broken"
        assert pair["margin"] == pytest.approx(pair["right"]["mean"] - pair["wrong"]["mean"], abs=1e-5)
        for name, reward in (("right", 1), ("wrong", 0)):
            side = pair[name]
            assert {len(side[key]) for key in "tmvgad"} == {len(side["t"])}
            assert side["g"][-1] == reward
            assert side["d"][-1] == pytest.approx(reward - side["v"][-1], abs=1e-5)
    # Every pair of the validation when asked, and the lowest and highest margin in any choice.
    assert main(["inspect", str(run), "--pairs", "999", "--output", str(tmp_path / "all.html")]) == 0
    everything = [pair["margin"] for pair in page_data(tmp_path / "all.html")["pairs"]]
    assert len(everything) == 18
    assert (everything[0], everything[-1]) == (margins[0], margins[-1])


def test_what_inspect_refuses(config_file, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "RUN must be the folder of a run" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--pairs", "0"]) == 2
    assert "--pairs must be at least 1, got 0" in capsys.readouterr().err
    assert main(["train", "--config", str(config_file), "training.max_steps=4"]) == 0
    assert main(["inspect", str(tmp_path / "run"), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "--output must be a file that can be written" in capsys.readouterr().err


@pytest.mark.parametrize("position", ["after", "before", "both"])
def test_a_page_of_rollouts_has_one_side_and_what_the_position_says(position, config_file, write_pairs, tmp_path):
    rows = [
        {"prompt": f"w{i} w2", "completion": f"w3 w{k} fine", "reward": float(k)} for i in range(9) for k in range(3)
    ]
    settings = [
        "data.sampling=rollouts",
        f"data.path={write_pairs(rows, 'rollouts.jsonl')}",
        "data.validation_problems=3",
    ]
    run = ["train", "--config", str(config_file), *settings, "training.max_steps=4"]
    assert main([*run, f"model.value_position={position}"]) == 0
    assert main(["inspect", str(tmp_path / "run")]) == 0
    page = page_data(tmp_path / "run" / "inspect.html")
    assert (page["kind"], page["sides"], page["rewards"]) == ("rollouts", ["right"], [0.0, 2.0])
    assert page["position"] == position
    assert len(page["pairs"]) == 9
    for item in page["pairs"]:
        side = item["right"]
        assert side["t"][0] == "w3"
        assert item["margin"] == pytest.approx(-abs(side["last"] - side["reward"]), abs=1e-5)
        assert item["misjudged"] == ((side["last"] >= 1.0) != (side["reward"] >= 1.0))
        # Each token but the one at the edge changes V from that before it to that after it.
        steps = {"after": range(1, 4), "before": range(3), "both": range(1, 4)}[position]
        for i in steps:
            change = side["v"][i + 1] - side["v"][i] if position == "before" else side["v"][i] - side["v"][i - 1]
            assert side["c"][i] == pytest.approx(change, abs=1e-5)


# ---- the browser -------------------------------------------------------------------------------------------------


def solution(texts, values, reward, mask=None):
    mask = mask or [1] * len(texts)
    batch = batch_of(*[torch.tensor([mask]).bool()] * 2, torch.tensor([reward]))
    credit = Credit(*(part[0] for part in assign_credit(torch.tensor([values]), batch, 1.0, 0.95)[:5]))
    changes = value_changes(credit, "after")
    rows = {"v": credit.values, "c": changes, "g": credit.targets, "a": credit.advantages, "d": credit.td_errors}
    lists = {name: [round(x, 6) for x in row.tolist()] for name, row in rows.items()}
    counted = [v for v, one in zip(values, mask, strict=True) if one]
    told = {"mean": sum(counted) / len(counted), "last": counted[-1], "reward": reward}
    return {"t": texts, "m": mask, **lists, **told, "drops": largest_drops(credit, 0)}


def make_pair(problem, right, wrong, mask=None):
    texts = [*HOSTILE, *(f" word{i}" for i in range(len(right) - len(HOSTILE)))]
    sides = {"right": solution(texts, right, 1.0), "wrong": solution(texts, wrong, 0.0, mask)}
    margin = sides["right"]["mean"] - sides["wrong"]["mean"]
    facts = {"problem": problem, "margin": margin, "misjudged": margin <= 0, "differs": 2}
    return {**facts, "prompt": f"prompt of {problem} <b>bold</b>", **sides}


LOW, HIGH = [0.2, 0.3, 0.25, 0.2, 0.1, 0.15], [0.6, 0.7, 0.8, 0.75, 0.7, 0.9]
PAGE = {
    "title": "A title with <b>markup</b> & more",
    "about": "about <i>it</i>",
    "facts": [("pairs", "3")],
    "kind": "pairs",
    "sides": ["right", "wrong"],
    "position": "after",
    "rewards": [0.0, 1.0],
    "pairs": [
        make_pair("middle", HIGH, [0.5, 0.6, 0.65, 0.4, 0.45, 0.3]),
        make_pair("misranked", LOW, HIGH),
        make_pair("best", HIGH, LOW, [1, 1, 0, 1, 1, 1]),
    ],
}


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs the Python package selenium")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser, tmp_path):
    """The page of `PAGE`, and a function that runs JavaScript in it."""
    (tmp_path / "page.html").write_text(render_page(PAGE), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    yield browser.execute_script
    assert browser.get_log("browser") == []


def choose(page, name, value):
    page(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        name,
        value,
    )


def shown(page):
    return page("return [...document.querySelectorAll('.card:not([hidden]) h2')].map(e => e.textContent)")


def test_no_text_of_the_data_becomes_markup_and_nothing_is_loaded(page, browser):
    assert page("return window.bad") is None
    assert page("return document.querySelectorAll('main img, main b b, h1 b, main script').length") == 0
    texts = page("return [...document.querySelector('.right .tokens').querySelectorAll('.t')].map(e => e.textContent)")
    assert texts[:3] == HOSTILE[:3]
    assert texts[4] == "a\u21b5\n\tb"
    assert browser.title == PAGE["title"]
    assert page("return document.querySelector('.prompt').textContent") == "prompt of misranked <b>bold</b>"
    assert page("return performance.getEntriesByType('resource').length") == 0
    addresses = re.findall(r"\w+://[^\s\"']+", render_page(PAGE))
    assert addresses == ["http://www.w3.org/2000/svg"]  # the name of SVG, which nobody asks a server for


def test_sorting_and_filtering(page):
    assert shown(page) == ["misranked", "middle", "best"]
    for order, expected in {
        "-margin": ["best", "middle", "misranked"],
        "-fall": ["middle", "best", "misranked"],
        "margin": ["misranked", "middle", "best"],
    }.items():
        choose(page, "sort", order)
        assert shown(page) == expected, order
    choose(page, "show", "misranked")
    assert shown(page) == ["misranked"]
    assert page("return document.getElementById('none').hidden")


def test_a_page_without_misranked_pairs_says_so(page, browser, tmp_path):
    (tmp_path / "good.html").write_text(render_page({**PAGE, "pairs": PAGE["pairs"][2:]}), encoding="utf-8")
    browser.get((tmp_path / "good.html").as_uri())
    choose(page, "show", "misranked")
    assert shown(page) == []
    assert page("return document.getElementById('none').innerText") == "No pair of this page is misranked."
    choose(page, "show", "all")
    assert shown(page) == ["best"]
    assert page("return document.getElementById('none').hidden")


def test_hovering_shows_the_numbers_of_a_token(page, browser):
    from selenium.webdriver import ActionChains

    tip = "const t = document.getElementById('tip'); return t.style.visibility === 'visible' ? t.innerText : null"
    assert page(tip) is None
    side = PAGE["pairs"][1]["wrong"]
    token = page("return document.querySelectorAll('.card')[0].querySelectorAll('.wrong .t')[5]")
    ActionChains(browser).move_to_element(token).perform()
    told = page(tip)
    assert "word0" in told
    lines = dict(re.findall(r"(V|target G|advantage|TD error|change of V|token)\n+(.+)", told.replace("\u2212", "-")))
    assert lines["token"] == "6 of 6"
    for name, key in {"V": "v", "target G": "g", "advantage": "a", "TD error": "d"}.items():
        assert float(lines[name]) == pytest.approx(side[key][5], abs=1e-4), name
    assert float(lines["change of V"]) == pytest.approx(0.2, abs=1e-4)
    assert page("return document.querySelectorAll('.t.on').length") == 1
    cursor = "return document.querySelectorAll('.card')[0].querySelector('.wrong .cursor').style.visibility"
    assert page(cursor) == "visible"
    # The plot points back at its token.
    plot = page("return document.querySelectorAll('.card')[0].querySelector('.right .plot')")
    ActionChains(browser).move_to_element_with_offset(plot, -plot.size["width"] // 2 + 55, 0).perform()
    assert "1 of 6" in page(tip)
    # A token of a gap has no numbers.
    gap = page("return document.querySelectorAll('.card')[2].querySelector('.wrong .gap')")
    page("arguments[0].scrollIntoView({block: 'center'})", gap)
    ActionChains(browser).move_to_element(gap).perform()
    assert "not written by the model" in page(tip)
    assert "V\n" not in page(tip)
    ActionChains(browser).move_to_element(page("return document.getElementById('title')")).perform()
    assert page(tip) is None


def test_the_arrow_keys_go_from_token_to_token(page, browser):
    from selenium.webdriver.common.keys import Keys

    box = page("return document.querySelector('.right .tokens')")
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert "2 of 6" in page("return document.getElementById('tip').innerText")


def test_colours_follow_the_value_the_choice_and_the_theme(page):
    card = "document.querySelectorAll('.card')[0]"
    colour = f"return getComputedStyle({card}.querySelectorAll(arguments[0])[arguments[1]]).backgroundColor"
    light = page(colour, ".wrong .t", 5), page(colour, ".right .t", 4)
    assert light[0] != light[1]
    choose(page, "colour", "d")
    assert page(colour, ".wrong .t", 5) != light[0]  # V is highest there, and its TD error lowest
    choose(page, "colour", "v")
    assert page(colour, ".wrong .t", 5) == light[0]
    choose(page, "range", "full")
    assert page("return document.querySelector('.legend').innerText").split() == ["0", "1.0000"]
    choose(page, "range", "page")
    body = "return getComputedStyle(document.body).backgroundColor"
    before = page(body)
    assert page("return document.documentElement.dataset.theme") == "light"
    page("document.getElementById('theme').click()")
    assert page("return document.documentElement.dataset.theme") == "dark"
    assert page(body) != before
    assert page(colour, ".wrong .t", 5) != light[0]
    page("document.getElementById('theme').click()")
    assert page(body) == before


def test_the_largest_drops_are_marked(page):
    choose(page, "sort", "-fall")
    marks = "return [...document.querySelectorAll('.card')[0].querySelectorAll(arguments[0])].map(e => e.textContent)"
    assert page(marks, ".wrong .mark") == ["\u25bc here it went wrong", "\u25bc2"]
    assert page(marks, ".wrong .t.drop") == [HOSTILE[3], " word0"]
    assert page(marks, ".wrong .drops li") == [
        "\u25bc1 \u22120.2500 at token 4 \"'\\\u2028",
        "\u25bc2 \u22120.1500 at token 6  word0",
    ]
    points = page("return document.querySelectorAll('.card')[0].querySelector('.wrong .plot .v').points.length")
    assert points == 6
    assert page("return document.querySelectorAll('.card')[0].querySelectorAll('.wrong .plot .fall').length") == 2


def test_no_mark_of_a_plot_stands_on_its_labels(page):
    overlaps = """
      const boxes = (plot, what) => [...plot.querySelectorAll(what)].map(e => e.getBoundingClientRect());
      const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
      return [...document.querySelectorAll('.plot')].map(plot => [
        boxes(plot, '.n').length,
        boxes(plot, '.n, .fall').filter(mark => boxes(plot, 'text:not(.n)').some(text => meet(mark, text))).length])"""
    # Under "token 6" the wrong solution of the second pair has its lowest V.
    assert page(overlaps) == [[3, 0], [2, 0], [2, 0], [2, 0], [2, 0], [2, 0]]


def test_the_line_of_a_plot_is_broken_at_a_gap(page):
    lines = """
      const plot = document.querySelectorAll('.card')[2].querySelector(arguments[0] + ' .plot');
      const places = (line) => [...line.points].map(p => Math.round(5 * (p.x - 52) / (plot.clientWidth - 60)));
      return [...plot.querySelectorAll('polyline.' + arguments[1])].map(places)"""
    assert page(lines, ".right", "v") == [[0, 1, 2, 3, 4, 5]]
    for key in "vg":
        assert page(lines, ".wrong", key) == [[0, 1], [3, 4, 5]]  # token 2 is the gap


def test_a_narrow_window_puts_the_sides_under_one_another(page, browser):
    try:
        browser.set_window_size(700, 900)
        boxes = page("return ['.right', '.wrong'].map(s => document.querySelector(s).getBoundingClientRect().left)")
        assert boxes[0] == boxes[1]
        assert page("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.set_window_size(1400, 1000)
