"""The HTML view, on light and dark pages."""

import re

from rich.text import Text

import bnguard
from bnguard.report.views import as_html, as_text
from tests.networks import conv_net

COLOURS = ["red", "bold red", "green", "bold yellow", "blue", "magenta", "cyan", "dim", "dim cyan"]


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_can_be_read_on_white_and_on_black():
    page = as_html(Text("\n").join(Text("word", style=style) for style in COLOURS))
    colours = re.findall(r"(?<![\w-])color: (#\w{6})", page)
    assert len(colours) == len(COLOURS)
    for colour in colours:
        assert 1.05 / (luminance(colour) + 0.05) > 3.9, colour
        assert (luminance(colour) + 0.05) / (luminance("#111111") + 0.05) > 3.9, colour


def test_what_stands_there_is_what_is_printed_and_nothing_is_markup():
    report = bnguard.inspect(conv_net(momentum=0.99))
    text = re.sub(r"<[^>]*>", "", report._repr_html_())
    assert str(report).splitlines()[0] in text
    assert "background" not in report._repr_html_()
    assert "&lt;b&gt;" in as_html(Text("<b>"))


def test_a_command_is_one_line_however_long(tmp_path):
    from bnguard.whatif.result import Diagnosis, Verdict

    command = f"bnguard recalibrate {'x' * 90}.ckpt"
    cause = Verdict(name="drift", message="off", advice="recalibrate", next_step=command)
    assert command in as_text(Diagnosis(cause=cause))
    assert command in Diagnosis(cause=cause)._repr_html_()
