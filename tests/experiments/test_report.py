"""The report shows texts as they are, in Markdown and on the page, and every claim beside its figure."""

from html.parser import HTMLParser

import pytest

from megat2i.experiments.arms import NANO
from megat2i.experiments.record import paired
from megat2i.experiments.report import write_report
from megat2i.html_page import plain, table


class Cells(HTMLParser):
    """Texts of the cells of all tables, and every tag."""

    def __init__(self, page: str):
        super().__init__()
        self.cells, self.tags, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = self.inside or tag in ("td", "th")
        if tag in ("td", "th"):
            self.cells.append("")
        elif tag == "br" and self.inside:
            self.cells[-1] += "\n"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


@pytest.fixture
def page(repository, monkeypatch, tmp_path):
    def write(budget: str) -> Cells:
        monkeypatch.chdir(repository)
        numbers = {"fig3": {"held_out_loss": paired([4.0, 4.1], [4.5, 4.6])}}
        facts, differences = [("machine", "two cores")], [("pictures", "many", "few")]
        found = write_report(tmp_path, NANO, numbers, [("python", "a b.py")], budget, facts, differences)
        assert [claim.verdict for claim in found] == ["does not hold"]
        return Cells((tmp_path / "report.html").read_text())

    return write


@pytest.mark.parametrize(
    "text",
    [
        "a | b | c", "*bold* __x__ _y_ snake_case", "<b>tag</b> &amp; <script>", "[link](http://x) `code`",
        "two\nlines", "back\\slash \\| # > - 1.", "",
    ],
)  # fmt: skip
def test_a_completion_is_shown_as_it_is(page, text):
    found = page(table(("prompt", "completion"), [("first", text), (text, "last")]))
    at = found.cells.index("first")
    assert found.cells[at : at + 4] == ["first", text, text, "last"]
    assert not {"script", "a", "em", "b"} & set(found.tags)


def test_commands_and_configuration_are_there(page, repository, tmp_path):
    page("")
    text, shown = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert (repository / NANO.config).read_text() in text and "python 'a b.py'" in text
    assert '<img alt="Figure 3: pre-trained against random" src="fig3.png">' in shown
    assert "<blockquote>" in shown and "text_tokens: 4096" in shown and plain("a_b") == "a_b"
