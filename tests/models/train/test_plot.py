"""The picture is one that programs can read."""

from __future__ import annotations

from xml.etree import ElementTree

from models.train.plot import HEIGHT, LABEL_GAP, WIDTH, svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


def test_each_line_is_drawn_to_scale_and_named() -> None:
    picture = ElementTree.fromstring(svg("a < b", "batch", {"one": [(1, 1.0), (4, 1.0)], "two": [(1, 2.0), (4, 0.0)]}))
    lines = [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in picture.iter(f"{NAMESPACE}polyline")
    ]
    (one, two), texts = lines, [text.text for text in picture.iter(f"{NAMESPACE}text")]
    assert {"a < b", "batch", "one", "two", "1", "4", "0.0", "1.0", "2.0"} <= set(texts)
    assert one[0][1] == one[1][1] == (two[0][1] + two[1][1]) / 2
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in one + two)


def test_doubling_is_the_same_distance_everywhere() -> None:
    picture = ElementTree.fromstring(svg("", "", {"a": [(1, 1.0), (2, 1.0), (8, 1.0)]}))
    (line,) = picture.iter(f"{NAMESPACE}polyline")
    first, second, third = (float(point.split(",")[0]) for point in line.attrib["points"].split())
    assert third - second == 2 * (second - first)


def test_names_of_lines_that_end_together_do_not_hide_each_other() -> None:
    picture = ElementTree.fromstring(svg("", "", {name: [(1, 1.0)] for name in "xyz"}))
    heights = sorted(float(text.attrib["y"]) for text in picture.iter(f"{NAMESPACE}text") if text.text in set("xyz"))
    assert [heights[1] - heights[0], heights[2] - heights[1]] == [LABEL_GAP, LABEL_GAP]


def test_numbers_below_the_axis_do_not_hide_each_other() -> None:
    picture = ElementTree.fromstring(svg("", "", {"a": [(37, 1.0), (148, 1.0), (296, 1.0), (300, 1.0)]}))
    below = {text.text for text in picture.iter(f"{NAMESPACE}text") if text.attrib["y"] == f"{HEIGHT - 32:.1f}"}
    assert below == {"37", "148", "300"}
