"""The tab itself: the stock TensorBoard in a headless Chromium, on logs of real training runs."""

import re

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from bnguard.tensorboard.log_report import write_page
from bnguard.tensorboard.metadata import STATS_TAG, LogError, standard_metrics
from bnguard.tensorboard.writer import BatchNormLog, ChannelSnapshot, EventSink
from tests.tensorboard.browsing import Tab, chromium
from tests.tensorboard.serving import tensorboard

LAGGING = "&p.bnguard.run=lagging&p.bnguard.metric=eval_shift_std"


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def running(digits_log):
    with tensorboard(digits_log) as server:
        server.wait_for_runs(2)
        yield server


@pytest.fixture(scope="module")
def opened(browser, running):
    tab = Tab(browser, running.url)
    yield tab
    tab.close()


@pytest.fixture
def tab(opened):
    opened.open(LAGGING)
    yield opened
    assert opened.faults == []


def test_the_tab_shows_the_layers_with_their_values(tab, running):
    layers = running.get("run", run="lagging").json()["layers"]
    _, steps, values = running.get("stats", run="lagging", metric="eval_shift_std").series()
    title = tab.frame.locator(".heat-names").get_attribute("aria-label")
    # The tab opens at the step at which the first cause shows most.
    place = steps.tolist().index(float(title.rpartition("at step ")[2]))
    labels = tab.frame.locator(".heat-names li").evaluate_all(
        "items => items.map(item => item.getAttribute('aria-label'))"
    )
    assert [label.split(":")[0] for label in labels] == layers
    shown = [float(re.search(r": ([\d.]+) σ", label).group(1)) for label in labels]
    assert shown == pytest.approx(values[place].tolist(), rel=6e-3)


def test_red_is_over_the_limit_and_nothing_else_is(tab, running):
    _, steps, values = running.get("stats", run="lagging", metric="eval_shift_std").series()
    place = steps.tolist().index(70)
    colours = tab.frame.evaluate(
        """([share, layers]) => {
          const canvas = document.querySelector(".heat-cells canvas");
          const context = canvas.getContext("2d");
          const x = Math.round(share * canvas.width);
          const height = canvas.height / layers;
          return Array.from({length: layers}, (_, row) =>
            [...context.getImageData(x, Math.round((row + 0.5) * height), 1, 1).data]);
        }""",
        [(70 - steps[0] - 0.5) / (steps[-1] - steps[0]), values.shape[1]],
    )
    is_red = [red > blue for red, _, blue, _ in colours]
    assert is_red == (values[place] > 1.0).tolist()
    assert True in is_red
    assert False in is_red


def test_a_click_on_a_finding_selects_its_layer_step_and_metric(tab):
    tab.frame.locator(".metric", has_text="Gain").click()
    tab.wait("document.querySelector('.overview h2').textContent === 'Gain'")
    chip = tab.frame.locator(".finding .chip").nth(1)
    name = chip.get_attribute("data-layer")
    step = re.search(r"since step (\d+)", chip.get_attribute("title")).group(1)
    chip.click()
    tab.wait(f"document.querySelector('.layer h2').textContent === '{name}'")
    assert tab.text(".stepper .step") == f"step {step}"
    assert tab.text(".overview h2") in ("Eval shift", "Eval variance")
    assert chip.get_attribute("aria-pressed") == "true"
    chosen = tab.frame.locator(".heat-names li[aria-selected=true]")
    assert chosen.inner_text() == name


def test_the_page_of_a_rule_opens_in_place(tab):
    rule = tab.frame.locator(".rule").first
    rule.locator("summary").click()
    rule.locator("h4", has_text="Why it matters").wait_for()
    assert "bnguard.recalibrate" in rule.locator("pre").first.inner_text()


def test_the_next_step_is_a_command_to_copy(tab):
    tab.frame.locator(".command button").first.click()
    tab.frame.locator(".command button", has_text="Copied").first.wait_for()


def test_keys_move_through_layers_steps_numbers_and_findings(tab):
    tab.frame.locator(".heat-names").focus()
    before = tab.text(".layer h2")
    tab.page.keyboard.press("Home")
    tab.wait("document.querySelector('.stepper .step').textContent === 'step 2'")
    tab.page.keyboard.press("ArrowRight")
    tab.wait("document.querySelector('.stepper .step').textContent === 'step 4'")
    tab.page.keyboard.press("End")
    tab.wait("document.querySelector('.stepper .step').textContent === 'step 80'")
    tab.page.keyboard.press("ArrowUp")
    tab.wait(f"document.querySelector('.layer h2').textContent !== '{before}'")
    tab.page.keyboard.press("m")
    tab.wait("document.querySelector('.overview h2').textContent === 'Eval variance'")
    tab.page.keyboard.press("f")
    tab.frame.locator(".finding.chosen").wait_for()


def test_the_colours_follow_tensorboard_into_the_dark(tab, tmp_path):
    pixel = """() => {
      const canvas = document.querySelector(".heat-cells canvas");
      const x = Math.round(0.9 * canvas.width);
      return [...canvas.getContext("2d").getImageData(x, 3, 1, 1).data];
    }"""
    light = tab.frame.evaluate(pixel)
    tab.page.evaluate("document.body.classList.add('dark-mode')")
    tab.wait("document.documentElement.dataset.theme === 'dark'")
    dark = tab.frame.evaluate(pixel)
    assert sum(light) > sum(dark)
    picture = tab.page.screenshot(path=tmp_path / "dark.png")
    assert len(picture) > 20_000


def test_the_address_leads_back_to_what_is_chosen(browser, running):
    chosen = {"run": "healthy", "metric": "gain", "layer": "layer2.1.bn1", "step": "40"}
    link = "".join(f"&p.bnguard.{key}={value}" for key, value in chosen.items())
    tab = Tab(browser, running.url, link)
    tab.wait("document.querySelector('.layer h2').textContent === 'layer2.1.bn1'")
    assert tab.text(".overview h2") == "Gain"
    assert tab.text(".stepper .step") == "step 40"
    tab.frame.locator(".stepper button").first.click()
    tab.page.wait_for_url("**p.bnguard.step=38**")
    tab.close()


def test_two_runs_stand_side_by_side(tab):
    tab.frame.locator("#compare").select_option("=healthy")
    tab.frame.locator(".comparison table").wait_for()
    tab.frame.locator(".heat-panel").nth(1).wait_for()
    rows = tab.frame.locator(".comparison tbody tr").all_inner_texts()
    shift = next(row for row in rows if row.startswith("Eval shift")).split()
    assert int(shift[2]) > int(shift[6])
    both = tab.frame.locator(".series", has_text="B Eval shift")
    both.wait_for()
    assert both.count() == 1


def test_a_channel_is_looked_at_by_itself(tab):
    canvas = tab.frame.locator(".channels canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] / 2, "y": 40})
    tab.wait("/^In channel/.test(document.querySelector('.verdict').textContent)")
    assert tab.text(".readout").startswith("Channel ")


def test_every_control_and_picture_has_a_name(tab):
    tab.frame.locator(".verdict:not(:empty)").wait_for()
    unnamed = tab.frame.evaluate(
        """() => [...document.querySelectorAll("button, select, canvas[role=img], [role=listbox]")]
          .filter(e => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
          .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    options = tab.frame.locator(".heat-names").get_attribute("aria-activedescendant")
    assert tab.frame.locator(f"#{options}").get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("width", [420, 760, 1100])
def test_narrow_windows_need_no_sideways_scrolling(browser, running, width):
    tab = Tab(browser, running.url, LAGGING + "&p.bnguard.compare=healthy", (width, 900))
    tab.frame.locator(".signal canvas").first.wait_for()
    wide = tab.frame.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    tab.close()


def test_an_empty_tab_says_what_to_do(browser, tmp_path):
    with SummaryWriter(tmp_path / "run") as writer:
        writer.add_scalar("loss", 1.0, 0)
    with tensorboard(tmp_path) as server:
        tab = Tab(browser, server.url)
        assert "BatchNormMonitor()" in tab.text(".empty pre")
        tab.close()


HOSTILE = "<img src=x onerror=alert(1)>\u202e\n</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def hostile_log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    metrics = standard_metrics()
    with SummaryWriter(folder / "run") as writer:
        log = BatchNormLog(writer, [HOSTILE, ""], metrics, [HOSTILE, HOSTILE])
        for step in range(5):
            log.add_stats(np.full((len(metrics), 2), 3.0), step)
        evidence = {"measure": HOSTILE, "value": "NaN", "limit": 1.0, "unit": HOSTILE}
        fix = {"summary": HOSTILE, "command": "ls\nrm -r x"}
        finding = {"code": HOSTILE, "name": HOSTILE, "severity": "error", "message": HOSTILE}
        finding |= {"layer": HOSTILE, "step": 2, "evidence": evidence, "fix": fix}
        log.add_findings([finding, {"code": "__proto__", "layer": "no such layer"}], 4)
        poisoned = ChannelSnapshot(running_mean=np.full(3, np.nan), running_var=np.full(3, np.inf))
        log.add_channels(HOSTILE, poisoned, 4)
    return folder


def test_hostile_names_are_text(browser, hostile_log):
    with tensorboard(hostile_log) as server:
        server.wait_for_runs(1)
        tab = Tab(browser, server.url)
        tab.frame.locator(".verdict").wait_for()
        _assert_is_text(tab.frame)
        assert "not finite" in tab.text(".verdict")
        tab.frame.locator(".finding-title").first.click()
        tab.frame.locator(".notes summary").first.click()
        tab.frame.locator(".finding-title").nth(1).click()
        tab.frame.locator(".finding.chosen").first.wait_for()
        tab.close()


def _assert_is_text(frame):
    name = frame.locator(".layer h2").inner_text()
    assert name.startswith("<img src=x onerror=alert(1)>\ufffd\ufffd</script>")
    assert frame.locator("img").count() == 0
    # A command that spans lines would run as soon as it is pasted.
    assert frame.locator(".command code").first.inner_text() == "ls\ufffdrm -r x"


@pytest.mark.parametrize("log", ["digits_log", "hostile_log"])
def test_the_page_in_one_file_needs_nothing_else(browser, tmp_path, request, log):
    file = tmp_path / "report.html"
    write_page(request.getfixturevalue(log), file)
    page = browser.new_page()
    faults, requests = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(file.as_uri())
    page.locator(".verdict").wait_for()
    if log == "hostile_log":
        _assert_is_text(page)
    else:
        assert page.locator(".heat-names li").count() == 21
        page.locator("#run").select_option("lagging")
        page.locator(".finding .chip").nth(2).click()
        page.locator(".chip[aria-pressed=true]").wait_for()
    assert faults == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_what_a_live_run_adds_shows_when_tensorboard_reloads(browser, tmp_path):
    metrics = standard_metrics()
    writer = SummaryWriter(tmp_path / "live")
    log = BatchNormLog(writer, ["bn"], metrics)
    log.add_stats(np.zeros((len(metrics), 1)), 0)
    writer.flush()
    with tensorboard(tmp_path) as server:
        server.wait_for_runs(1)
        tab = Tab(browser, server.url)
        tab.wait("document.querySelector('.headline').textContent.includes('step 0 to 0')")
        # The page asks by itself once soon after it is opened, then every ten seconds.
        tab.page.wait_for_timeout(2000)
        log.add_stats(np.ones((len(metrics), 1)), 70)
        log.add_findings([{"code": "BN301", "layer": "bn", "severity": "error"}], 70)
        writer.flush()
        tab.page.wait_for_timeout(1500)  # TensorBoard reads every second
        tab.page.locator("app-header-reload button").first.click()
        shows_more = "document.querySelector('.headline').textContent.includes('step 0 to 70')"
        tab.frame.wait_for_function(shows_more, timeout=6000)
        tab.wait("document.querySelector('.stepper .step').textContent === 'step 70'")
        tab.frame.locator(".finding.error").wait_for()
        tab.close()
    writer.close()


def test_one_bad_step_among_many_is_seen(browser, tmp_path):
    metrics = standard_metrics()
    with SummaryWriter(tmp_path) as writer:
        log = BatchNormLog(writer, ["first", "second"], metrics)
        for step in range(1900):
            values = np.full((len(metrics), 2), 0.1)
            values[0, 1] = 5.0 if step == 777 else 0.1
            log.add_stats(values, step)
    with tensorboard(tmp_path) as server:
        server.wait_for_runs(1)
        tab = Tab(browser, server.url, "&p.bnguard.metric=eval_shift_std", (600, 900))
        red = tab.frame.evaluate(
            """() => {
              const canvas = document.querySelector(".heat-cells canvas");
              const context = canvas.getContext("2d");
              return [0.25, 0.75].map((row) => {
                const y = Math.round(row * canvas.height);
                const pixels = context.getImageData(0, y, canvas.width, 1).data;
                return [...Array(canvas.width).keys()]
                  .filter((x) => pixels[4 * x] > pixels[4 * x + 2])
                  .map((x) => x / canvas.width);
              });
            }"""
        )
        assert red[0] == []
        assert red[1] == pytest.approx([777 / 1900], abs=0.005)
        tab.close()


def test_what_of_a_log_cannot_be_read_is_remarked(browser, tmp_path):
    metrics = standard_metrics()
    with SummaryWriter(tmp_path / "run") as writer:
        log = BatchNormLog(writer, ["bn"], metrics)
        for step in range(3):
            log.add_stats(np.zeros((len(metrics), 1)), step)
        EventSink(writer)._add(STATS_TAG, {"dtype": 20}, 9, b"")
    with tensorboard(tmp_path) as server:
        server.wait_for_runs(1)
        tab = Tab(browser, server.url)
        tab.wait("document.querySelector('.headline').textContent.includes('step 0 to 2')")
        assert "1 event was left out" in tab.frame.locator("body").inner_text()
        assert tab.faults == []
        tab.close()


def test_a_page_that_cannot_be_written_is_one_clear_error(tmp_path, digits_log):
    file = tmp_path / "nowhere" / "report.html"
    with pytest.raises(LogError, match=r"report\.html cannot be written: No such file"):
        write_page(digits_log, file)
