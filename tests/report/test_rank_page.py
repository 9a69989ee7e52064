"""The rank report's page: what stands in it, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kpsvd_tune.errors import InputError
from kpsvd_tune.report.heat_map import heat_map_place
from kpsvd_tune.report.rank_page import rank_page, write_rank_report
from kpsvd_tune.report.results import LayerReport, RankReport

EVIL = "model.layers.1.</script><img src=x onerror=alert(1)>{{data}}&amp;"


def layer(name: str, rank: int = 2, **changes) -> LayerReport:
    values = tuple(float(12 - term) for term in range(8))
    report = LayerReport(
        name=name,
        out_features=6,
        in_features=4,
        factor_shape=(3, 2, 2, 2),
        rank=rank,
        rank_energy=5,
        rank_elbow=3,
        bound_by="max",
        energy_window=0.8,
        energy_total=0.25,
        parameters=10 * rank,
        relative_error=0.7,
        singular_values=values,
        stable_rank=1.5,
        seconds=0.01,
    )
    return replace(report, **changes)


COLUMNS = list(layer("a").in_words())


def report_of(*layers: LayerReport, **changes) -> RankReport:
    totals = {
        "modules": len(layers),
        "trainable_parameters": sum(each.parameters for each in layers),
        "base_parameters": 1000,
        "energy": 0.5,
    }
    return replace(RankReport(model="tiny", totals=totals, layers=layers), **changes)


@pytest.fixture
def report() -> RankReport:
    names = ["self_attn.q_proj", "mlp.up_proj"]
    layers = [
        layer(f"model.layers.{number}.{name}", rank=1 + 3 * number + place)
        for number in (0, 1, 10)
        for place, name in enumerate(names)
    ]
    return report_of(
        *layers,
        untouched=(("lm_head", "output embedding"),),
        rule={"method": "energy+elbow", "budget": None},
    )


class Elements(HTMLParser):
    """The start tags of a page with their attributes, and the text of its table rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.rows.append([])


def data_of(page: str):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def budget_of(page: str) -> list[list[str]]:
    """Rank, parameters and share of each line that compares with LoRA."""
    rows = Elements(page.replace("\N{NO-BREAK SPACE}", " ")).rows
    return [row[1:] for row in rows if row and row[0].startswith("LoRA")]


@pytest.mark.slow
def test_every_layer_has_its_cell_by_number_and_kind(report: RankReport):
    data = data_of(rank_page(report))
    assert data["columns"] == ["0", "1", "10"]
    assert data["rows"] == ["self_attn.q_proj", "mlp.up_proj"]
    assert data["cells"] == [[0, 2, 4], [1, 3, 5]]
    assert [each["rank"] for each in data["layers"]] == [1, 2, 4, 5, 31, 32]


def test_names_of_other_forms_get_a_place():
    names = ["transformer.h.1.attn.c_attn", "score", "transformer.h.0.mlp.c_fc"]
    data = data_of(rank_page(report_of(*(layer(name) for name in names))))
    assert data["columns"] == ["0", "1", "other"]
    assert data["rows"] == ["attn.c_attn", "score", "mlp.c_fc"]
    assert data["cells"] == [[None, 0, None], [None, None, 1], [2, None, None]]


def test_two_stacks_of_layers_do_not_share_cells():
    names = ["encoder.block.0.wi", "decoder.block.0.wi"]
    data = data_of(rank_page(report_of(*(layer(name) for name in names))))
    assert data["rows"] == ["encoder.block: wi", "decoder.block: wi"]
    assert data["cells"] == [[0], [1]]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers", 3, "mlp.up_proj")),
        ("layers.2.experts.7.w1", ("layers", 2, "experts.7.w1")),
        ("lm_head", ("", None, "lm_head")),
        ("4", ("", 4, "")),
        ("layers.²", ("", None, "layers.²")),
    ],
)
def test_a_name_is_split_at_its_first_number(name: str, place):
    assert heat_map_place(name) == place


def test_the_table_has_a_row_for_every_layer(report: RankReport):
    rows = Elements(rank_page(report)).rows
    columns = [each for each in COLUMNS if each != "note"]
    assert columns in rows
    row = next(row for row in rows if row and row[0] == "model.layers.10.mlp.up_proj")
    shown = dict(zip(columns, row, strict=True))
    assert shown["rank"] == "32"
    assert shown["out × in"] == "6 × 4"
    assert (shown["A"], shown["B"]) == ("3 × 2", "2 × 2")
    assert shown["energy kept"] == "25.0 %"
    assert shown["bound by"] == "max"


def test_only_proposals_that_the_rule_asks_for_are_shown_and_explained(report: RankReport):
    for method, shown in (("fixed", ()), ("elbow", ("elbow",)), ("energy", ("energy",))):
        page = rank_page(replace(report, rule={"method": method}))
        header = next(row for row in Elements(page).rows if "module" in row)
        for name in ("energy", "elbow"):
            assert (f"by {name}" in header) == (name in shown)
            assert (f"<b>by {name}</b>" in page) == (name in shown)
            assert data_of(page)["uses"][name] == (name in shown)
    assert "where it is 0, the terms that hold the wanted share" in page


def test_notes_have_a_column_where_there_are_some():
    page = rank_page(report_of(layer("a.0", note="7 is prime"), layer("a.1")))
    assert list(COLUMNS) in Elements(page).rows
    assert '<td data-key="7 is prime" class="text">7 is prime</td>' in page


def test_the_page_is_less_than_half_of_plotly(report: RankReport):
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    assert len(rank_page(report)) < 0.5 * len(get_plotlyjs())
    assert rank_page(report) == rank_page(report)


def test_the_budget_is_set_beside_the_lora_ranks_around_it():
    # Rank 1 of LoRA costs (6 + 4) * 2 = 20 on the two adapted layers; the third takes no part.
    page = rank_page(report_of(layer("a.0", rank=4), layer("a.1", rank=1), layer("a.2", rank=0)))
    assert "<b>2.50</b>LoRA rank for the same budget" in page
    assert budget_of(page) == [["1", "20", "40 %"], ["2", "40", "80 %"], ["3", "60", "120 %"]]


def test_nothing_is_compared_where_no_layer_has_a_term():
    page = rank_page(report_of(layer("a.0", rank=0)))
    assert "<b>–</b>LoRA rank for the same budget" in page
    assert budget_of(page) == []


def test_the_page_fetches_nothing(report: RankReport):
    for tag, attributes in Elements(rank_page(report)).tags:
        assert tag not in ("link", "img", "iframe"), tag
        assert not {"src", "href"} & attributes.keys(), (tag, attributes)


def test_what_a_name_holds_stays_text(report: RankReport):
    hostile = report_of(
        layer(EVIL, note="<b>&", bound_by="<i>"),
        model="</title><script>alert(1)</script>",
        untouched=(("<u>", "<s>"),),
        rule={"method": "<q>"},
    )
    page = rank_page(hostile)

    def tags(page: str) -> set[str]:
        return {tag for tag, _ in Elements(page).tags}

    assert tags(page) == tags(rank_page(report))
    assert page.count("</script>") == rank_page(report).count("</script>")
    data = data_of(page)
    assert data["layers"][0]["name"] == EVIL
    # Plotly reads tags and entities in its labels.
    assert "<" not in data["layers"][0]["label"] + data["layers"][0]["bound_by_label"]
    assert "&amp;amp;" in data["rows"][0]


def test_what_is_not_finite_is_null():
    page = rank_page(report_of(layer("a.0", relative_error=float("nan"), stable_rank=float("inf"))))
    read = data_of(page)["layers"][0]
    assert (read["relative_error"], read["stable_rank"]) == (None, None)


def test_without_plotly_the_install_line_is_named(report: RankReport, monkeypatch, tmp_path: Path):
    (tmp_path / "rank_report.html").write_text("of an earlier run")
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(InputError, match=r"pip install 'kpsvd-tune\[report\]'"):
        rank_page(report)
    note = write_rank_report(report, tmp_path)
    assert note is not None
    assert note.startswith("rank_report.html was not written: plotly is not installed")
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "rank_report.csv",
        "rank_report.json",
    ]


def test_the_page_is_written_beside_the_tables(report: RankReport, tmp_path: Path):
    assert write_rank_report(report, tmp_path) is None
    assert (tmp_path / "rank_report.html").read_text(encoding="utf-8") == rank_page(report)


@pytest.fixture
def opened_report(browser, tmp_path: Path):
    """Opens the rank report of this test's folder, once its spectrum is drawn."""

    def open_report(**options: str):
        opened = browser(tmp_path / "rank_report.html", **options)
        opened.page.wait_for_selector("#spectrum .annotation-text")
        return opened

    return open_report


def click_cell(page, row: int, column: int, rows: int, columns: int) -> None:
    box = page.locator("#map .nsewdrag").bounding_box()
    x = box["x"] + box["width"] * (column + 0.5) / columns
    y = box["y"] + box["height"] * (row + 0.5) / rows
    page.mouse.move(x, y)
    page.mouse.click(x, y)


def marks(page) -> list[str]:
    texts: list[str] = page.locator("#spectrum .annotation-text").all_text_contents()
    return texts


@pytest.mark.slow
def test_a_click_on_a_cell_shows_the_spectrum_of_its_layer(
    report: RankReport, opened_report, tmp_path: Path
):
    clicked = layer("model.layers.1.mlp.up_proj", rank=4, rank_elbow=6, singular_values=(9.0, 7.5))
    report = replace(report, layers=(*report.layers[:3], clicked, *report.layers[4:]))
    write_rank_report(report, tmp_path)
    opened = opened_report()
    page = opened.page
    assert page.inner_text("#spectrum-title") == "model.layers.0.self_attn.q_proj"
    assert marks(page) == ["chosen rank 1", "energy threshold 5", "elbow 3"]

    click_cell(page, row=1, column=1, rows=2, columns=3)
    page.wait_for_function(
        "document.getElementById('spectrum-title').textContent.includes('layers.1.mlp')"
    )
    assert marks(page) == ["chosen rank 4", "energy threshold 5", "elbow 6"]
    assert page.evaluate("[...document.getElementById('spectrum').data[0].y]") == [9.0, 7.5]

    assert opened.complaints == []
    assert opened.requests == [(tmp_path / "rank_report.html").as_uri()]


@pytest.mark.slow
def test_the_buttons_and_headers_of_the_page_work(
    report: RankReport, opened_report, tmp_path: Path
):
    write_rank_report(report, tmp_path)
    opened = opened_report(scheme="dark")
    page = opened.page

    def colours() -> list[list[float]]:
        z: list[list[float]] = page.evaluate(
            "document.getElementById('map').data[0].z.map((row) => Array.from(row))"
        )
        return z

    def modules() -> list[str]:
        names: list[str] = page.locator("#layers .pick").all_text_contents()
        return names

    assert colours() == [[1, 4, 31], [2, 5, 32]]
    page.click("[data-measure=parameters]")
    assert colours() == [[10, 40, 310], [20, 50, 320]]
    page.click("[data-measure=energy_total]")
    assert colours() == [[0.25] * 3] * 2

    rank = page.get_by_role("columnheader", name="rank", exact=True)
    rank.get_by_role("button").click()
    assert modules() == [each.name for each in report.layers]
    rank.get_by_role("button").click()
    assert modules() == [each.name for each in reversed(report.layers)]
    page.get_by_role("columnheader", name="module").get_by_role("button").click()
    assert [name.split(".")[2] for name in modules()] == ["0", "0", "1", "1", "10", "10"]
    page.get_by_role("button", name="model.layers.10.mlp.up_proj").click()
    assert marks(page)[0] == "chosen rank 32"

    assert page.get_attribute("html", "data-theme") == "dark"
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "light"
    assert opened.complaints == []


@pytest.mark.slow
def test_a_hostile_name_does_no_harm_in_a_browser(opened_report, tmp_path: Path):
    write_rank_report(report_of(layer(EVIL), layer("lm_head", rank=0, rank_energy=0)), tmp_path)
    opened = opened_report()
    assert opened.page.inner_text("#spectrum-title") == EVIL
    click_cell(opened.page, row=1, column=1, rows=2, columns=2)
    opened.page.wait_for_function(
        "document.getElementById('spectrum-title').textContent === 'lm_head'"
    )
    # A proposal of 0 is told beside the figure, which has no term 0 to mark.
    assert marks(opened.page) == ["chosen rank 0", "elbow 3"]
    assert "rank by energy\n0" in opened.page.inner_text("#facts")
    assert opened.page.locator("img").count() == 0
    assert opened.complaints == []
    assert len(opened.requests) == 1


@pytest.mark.slow
def test_figures_start_at_zero_and_a_phone_scrolls_nothing_but_tables(
    report: RankReport, opened_report, fits_width, tmp_path: Path
):
    write_rank_report(report, tmp_path)
    opened = opened_report()
    page = opened.page
    assert page.evaluate("document.getElementById('spectrum').layout.yaxis.range[0]") == 0
    assert page.evaluate("document.getElementById('map').data[0].zmin") == 0
    assert fits_width(page, 390)
    page.wait_for_function("document.getElementById('map').layout.yaxis.ticktext[0] === 'q_proj'")
    assert opened.complaints == []


@pytest.mark.slow
def test_a_browser_that_cannot_unpack_plotly_still_shows_the_tables(
    report: RankReport, opened_report, tmp_path: Path
):
    write_rank_report(report, tmp_path)
    opened = opened_report()
    opened.page.add_init_script("delete globalThis.DecompressionStream")
    opened.page.reload()
    alert = opened.page.wait_for_selector("[role=alert]")
    assert alert.inner_text().startswith("The figures need a browser of 2023 or newer")
    assert opened.page.locator("#layers tbody tr").count() == len(report.layers)
    assert opened.page.inner_text("#spectrum-title") == report.layers[0].name


def test_a_report_without_layers_is_written(tmp_path: Path):
    write_rank_report(report_of(), tmp_path)
    assert (tmp_path / "rank_report.csv").read_text().startswith("name,out_features,")
    assert json.loads((tmp_path / "rank_report.json").read_text())["layers"] == []


def test_the_colours_of_cells_that_are_all_zero_have_a_range(report: RankReport):
    assert "zmax: high > 0 ? high : 1," in rank_page(report)
