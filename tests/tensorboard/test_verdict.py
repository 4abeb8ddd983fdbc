"""What the page answers at first sight, in the one-file report of three small runs."""

import itertools
import shutil

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from bnguard.report import picture
from bnguard.tensorboard.log_report import write_page
from bnguard.tensorboard.metadata import standard_metrics
from bnguard.tensorboard.writer import BatchNormLog, ChannelSnapshot
from tests.tensorboard.browsing import chromium

METRICS = standard_metrics()
MOMENTS = ("running_mean", "running_var", "batch_mean", "batch_var", "eval_mean", "eval_var",
           "gamma", "beta")  # fmt: skip
LAYERS = ("stem.bn", "body.bn", "head.bn")
CALM = {"values_per_channel": 64.0, "variance_kept": 0.9, "frozen_moved_std": np.nan}
COMMAND = "bnguard recalibrate 'runs/my run/last.ckpt' --model my.Net --data my.Data"
SLOW = {
    "code": "BN303",
    "name": "unconverged-statistics",
    "severity": "warning",
    "layer": "body.bn",
    "step": 0,
    "message": "62% of the running statistics are still the initial mean",
    "evidence": {"measure": "initial statistics left", "value": 62.0, "limit": 5.0, "unit": "%"},
    "fix": {"summary": "raise momentum", "command": COMMAND},
}
DRIFT = {
    **SLOW,
    "code": "BN301",
    "name": "statistic-drift",
    "step": 100,
    "evidence": {"measure": "variance off by", "value": np.log(28), "limit": 1.5, "unit": "ln"},
    "cause": "BN303",
}
FROZEN = {
    **SLOW,
    "code": "BN101",
    "name": "frozen-but-updating",
    "severity": "error",
    "layer": "stem.bn",
    "message": "gamma and beta are frozen, but the running statistics move",
    "evidence": {"measure": "updates while frozen", "value": 120, "limit": 0},
}
SORTED = {
    **SLOW,
    "code": "BN203",
    "name": "correlated-batches",
    "layer": "stem.bn",
    "message": "the data are sorted or grouped",
    "evidence": {"measure": "variance of batch means", "value": 8.1, "limit": 3.4},
    "fix": {"summary": "shuffle"},
}


def _write(folder, findings, values_at):
    with SummaryWriter(folder) as writer:
        log = BatchNormLog(writer, LAYERS, METRICS)
        for step in range(0, 101, 2):
            numbers = {**CALM, **values_at(step)}
            rows = [np.broadcast_to(numbers.get(m.key, 0.1), 3) for m in METRICS]
            log.add_stats(np.array(rows), step)
        log.add_findings(findings, 100)
        ones = np.ones(6)
        log.add_channels("body.bn", ChannelSnapshot(running_mean=ones, running_var=ones), 100)


def _slow(step):
    ratio = np.log(28) if step != 60 else np.log(40)
    shift = np.nan if step < 20 else 2.0
    ratios = {"eval_log_variance_ratio": [2.0, ratio, 1.9], "batch_log_variance_ratio": 3.0}
    return {**ratios, "eval_shift_std": [0.2, shift, 0.3]}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    _write(folder / "slow", [DRIFT, SLOW], _slow)
    _write(folder / "frozen", [FROZEN], lambda step: {"frozen_moved_std": [0.01 * step, 0, 0]})
    calm = {"eval_shift_std": 0.2, "data_order": [2.4, np.nan, np.nan]}
    _write(folder / "sorted", [SORTED], lambda step: calm)
    _write(folder / "fine", [], lambda step: {"eval_shift_std": 3.0 if step < 10 else 0.1})
    file = folder / "report.html"
    write_page(folder, file)
    return file


@pytest.fixture(scope="module")
def page(report):
    with chromium() as browser:
        page = browser.new_page()
        page.set_viewport_size({"width": 1400, "height": 900})
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.add_init_script(
            """window.texts = [];
            const fill = CanvasRenderingContext2D.prototype.fillText;
            CanvasRenderingContext2D.prototype.fillText = function (text, ...place) {
              window.texts.push(text);
              return fill.call(this, text, ...place);
            };"""
        )
        page.goto(report.as_uri())
        yield page
        assert page.faults == []


def _open(page, run):
    page.locator(".runs button", has_text=f"{run}:").click()
    shown = "run => document.querySelector('.runs [aria-pressed=true]').innerText.includes(run)"
    page.wait_for_function(shown, arg=f"{run}:")
    page.wait_for_timeout(150)


def _first(page, selector):
    return page.locator(selector).first.inner_text()


def test_all_runs_show_their_verdict_the_worst_first(page):
    strip = page.locator(".runs button").all_inner_texts()
    assert [" ".join(text.split()) for text in strip] == [
        "frozen: 1 error",
        "slow: 1 warning",
        "sorted: 1 warning",
        "✓ fine: no problems",
    ]
    assert "slow · 1 warning" in page.locator("#run option").all_inner_texts()


def test_a_cause_is_one_card_with_its_number_its_effects_and_its_command(page):
    _open(page, "slow")
    assert _first(page, ".headline").startswith("1 cause, 1 layer")
    assert page.locator(".finding").count() == 1
    assert (
        _first(page, ".finding-title") == "62% of the running statistics are still the initial mean"
    )
    assert _first(page, ".number") == "initial statistics left 62% (limit 5%)"
    assert page.locator(".gauge").inner_text().split("\n") == ["limit 5%", "100%"]
    assert page.locator(".effects li").first.is_hidden()
    page.locator(".effects summary").click()
    effect = "BN301 statistic-drift, 1 layer: variance off by 28× (limit 4.5×)"
    assert page.locator(".effects li").all_inner_texts() == [effect]
    assert _first(page, ".command code") == COMMAND
    assert page.locator(".command").first.bounding_box()["height"] < 45


def test_the_page_opens_on_the_worst_layer_and_step_of_the_first_cause(page):
    _open(page, "slow")
    assert _first(page, ".overview h2") == "Eval variance"
    assert _first(page, ".layer h2") == "body.bn"
    assert _first(page, ".stepper .step") == "step 60"
    _open(page, "frozen")
    assert _first(page, ".overview h2") == "Moved while frozen"
    assert _first(page, ".layer h2") == "stem.bn"
    _open(page, "sorted")
    assert _first(page, ".overview h2") == "Data order"
    assert _first(page, ".heat-values .over") == "▲ 2.4"
    assert "▲ beyond the limit" in " ".join(_first(page, ".legend").split())


def test_a_healthy_run_says_what_was_looked_at_and_opens_within_the_limits(page):
    _open(page, "fine")
    assert _first(page, ".headline").startswith("✓ No problems found")
    assert "51 logged steps: eval shift" in _first(page, ".fine")
    assert page.locator(".metric[aria-pressed=true] .badge").count() == 0
    assert page.locator(".heat-values .over").count() == 0


def test_since_agrees_with_the_picture(page):
    _open(page, "slow")
    page.locator(".effects .link").first.evaluate("link => link.click()")
    page.locator(".metric", has_text="Eval shift").click()
    page.wait_for_function(
        "() => document.querySelector('.stepper .step').textContent === 'step 0'"
    )


def test_limits_show_where_every_value_is_beyond_them_on_an_axis_of_factors(page):
    _open(page, "slow")
    page.evaluate("texts.length = 0")
    page.locator(".curves canvas").first.scroll_into_view_if_needed()
    page.locator(".stepper button").first.click()
    page.wait_for_function("() => texts.includes('all beyond 4.5×')")
    drawn = page.evaluate("texts")
    assert {"too small ↑", "20×"} <= set(drawn)
    assert "28× too small" in page.locator(".curves").inner_text()


def test_what_never_changes_is_one_line(page):
    lines = page.locator(".constant", has_text="Values per channel")
    assert "64" in lines.inner_text()
    assert lines.locator("canvas").count() == 0


_IS_AT_REST = """() => new Promise((done) => {
  const top = () => document.querySelector(".curves canvas").getBoundingClientRect().top;
  const before = top();
  setTimeout(() => done(top() === before), 200);
})"""


def test_dragging_zooms_all_curves_and_a_double_click_shows_all(page):
    _open(page, "slow")
    canvas = page.locator(".curves canvas").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_function(_IS_AT_REST)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 40)
    page.evaluate("texts.length = 0")
    page.mouse.up()
    page.wait_for_function("() => texts.length > 10")
    assert not {"50", "100"} & set(page.evaluate("texts"))
    page.evaluate("texts.length = 0")
    canvas.dblclick(position={"x": 80, "y": 40})
    page.wait_for_function("() => texts.includes('50')")
    assert any(text.startswith("step ") for text in page.evaluate("texts"))  # the cross-hair


def test_arrow_keys_choose_a_channel(page):
    page.locator(".channels canvas").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "() => document.querySelector('.readout').innerText.startsWith('Channel 0')"
    )
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "() => document.querySelector('.readout').innerText.startsWith('Channel 5')"
    )


@pytest.mark.parametrize("width", [1400, 800])
def test_the_measures_fit_in_one_row(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    boxes = page.locator(".metric").evaluate_all(
        "chips => chips.map(chip => chip.getBoundingClientRect()).map(b => [b.top, b.right])"
    )
    page.set_viewport_size({"width": 1400, "height": 900})
    assert len({top for top, _ in boxes}) == 1
    assert max(right for _, right in boxes) <= width


def _heat_colours(page, theme):
    """Return the colours up to the limit and beyond it, 256 of each, in sRGB from 0 to 255."""
    code = """async theme => {
      const {palette} = await import("bnguard/scale.js");
      return [...palette(theme).first].map(p => [p & 255, (p >> 8) & 255, (p >> 16) & 255]);
    }"""
    return np.array(page.evaluate(code, theme)[:512], dtype=float)


def test_worse_is_never_paler(page):
    for theme, sign in (("light", -1), ("dark", 1)):
        colours = _heat_colours(page, theme)
        lightness = sign * colours @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(lightness[:256]) >= -1).all()
        assert (np.diff(lightness[256:]) >= -1).all()
        assert lightness[256] - lightness[255] > 20 / (1 + (theme == "dark"))
        if theme == "dark":
            chroma = np.ptp(colours[256:], axis=1)
            assert (np.diff(chroma) >= -1).all()


# Linear RGB as it is seen without one kind of cones: Machado, Oliveira & Fernandes, "A
# physiologically-based model for simulation of color vision deficiency" (2009), severity 1.
SIGHTS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
          [0.0193339, 0.1191920, 0.9503041]]  # fmt: skip


def _seen(colours, sight):
    """Return colours as CIELAB, in which 2.3 is a just noticeable difference."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(sight), 0, 1)
    xyz = seen @ np.transpose(TO_XYZ) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return f @ [[0, 500, 0], [116, -500, 200], [0, 0, -200]] - [16, 0, 0]


def _picture_colours():
    stops = [(place, [int(c[i : i + 2], 16) for i in (1, 3, 5)]) for place, c in picture._COLOURS]
    halves = (zip(*part, strict=True) for part in (stops[:2], stops[2:]))
    ramps = [np.linspace(*colours, 256) for _, colours in halves]
    return np.concatenate(ramps)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("shown", ["light", "dark", "picture"])
def test_colour_blind_eyes_see_how_bad_a_value_is(page, shown, sight):
    colours = _picture_colours() if shown == "picture" else _heat_colours(page, shown)
    seen = _seen(colours, SIGHTS[sight])
    # Worse is never closer to the best; beyond 50 no two colours are confused.
    from_best = np.minimum(np.linalg.norm(seen - seen[0], axis=1), 50)
    assert np.diff(from_best).min() > -1
    # A quarter of the limit within it, a doubling beyond it.
    for steps in (seen[[0, 64, 128, 192, 255]], seen[[256, 341, 426, 511]]):
        assert np.linalg.norm(np.diff(steps, axis=0), axis=1).min() > 2 * 2.3
    across = np.linalg.norm(seen[:256, None] - seen[None, 256:], axis=2)
    assert across.min() > 10 * 2.3


def test_five_runs_of_a_resnet_stay_below_600_kb(tmp_path):
    generator = np.random.default_rng(0)
    noisy = [metric.key.startswith(("batch", "running", "gain")) for metric in METRICS]
    layers = [f"layer{place}.bn" for place in range(20)]
    with SummaryWriter(tmp_path / "a") as writer:
        log = BatchNormLog(writer, layers, METRICS)
        level = generator.lognormal(size=(len(METRICS), 20))
        for step in range(150):
            level[noisy] *= generator.lognormal(0, 0.2, level[noisy].shape)
            log.add_stats(level, step)
        for layer, step in itertools.product(layers, (50, 100, 149)):
            moments = generator.lognormal(size=(8, 28))
            log.add_channels(
                layer, ChannelSnapshot(**dict(zip(MOMENTS, moments, strict=True))), step
            )
        log.add_findings([{**DRIFT, "layer": layer} for layer in layers], 149)
    for name in "bcde":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    file = tmp_path / "report.html"
    write_page(tmp_path, file)
    assert file.stat().st_size <= 600_000


def test_the_report_is_small_and_prints(report, page):
    assert report.stat().st_size < 300_000
    page.emulate_media(media="print")
    assert page.locator(".toolbar").is_hidden()
    assert page.locator(".finding").first.is_visible()
    page.emulate_media(media="screen")
