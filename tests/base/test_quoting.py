"""Values and errors in messages: short, on one line, and writable anywhere."""

import pytest

from megavlm.base.quoting import quoted, shortened

PICTURE = "iVBORw0KGgo" * 100_000  # base64 that was taken for a path


@pytest.mark.parametrize(
    "value",
    [PICTURE, [PICTURE] * 9, {PICTURE: PICTURE}, [[[[[[PICTURE]]]]]], "a\nb\ud83d\x1b[2J", 7, None, float("nan")],
)
def test_any_value_is_one_short_line(value):
    for text in (quoted(value), shortened(value), shortened(ValueError(value)), quoted(value, 20)):
        assert len(text) <= 200
        assert text.isprintable()
        text.encode()
    assert len(quoted(value, 20)) <= 20


def test_short_values_are_whole():
    assert quoted("a 'b'") == repr("a 'b'")
    assert quoted({"role": ["x", 1.5]}) == "{'role': ['x', 1.5]}"
    assert shortened("folder/a  b.png") == "folder/a  b.png"


def test_both_ends_of_a_long_path_are_shown():
    assert shortened(f"begin/{PICTURE}/end.png").startswith("begin/")
    assert shortened(f"begin/{PICTURE}/end.png").endswith("/end.png")
