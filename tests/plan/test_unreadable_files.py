"""Files of measurements and of data that cannot be read."""

import pytest

from megavlm.base.errors import UserError
from megavlm.plan.gpus import gpu_of
from megavlm.plan.mix import DataMix


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file or directory"),
        ("a folder", "Is a directory"),
        ("a: [", "does not parse as YAML"),
        ("5", "TypeError"),
        ("{name: x}", "KeyError"),
    ],
)
def test_the_message_says_in_words_what_is_wrong(tmp_path, content, cause):
    file = tmp_path / "mine.yaml"
    if content == "a folder":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as refused:
        gpu_of(str(file))
    assert refused.value.message.startswith(f"--gpu {file} cannot be read as a file of measurements: ")
    assert cause in refused.value.message
    assert "Errno" not in refused.value.message
    assert "Error(2" not in refused.value.message


def test_a_missing_summary_of_data(tmp_path):
    with pytest.raises(UserError, match=r"of megavlm data inspect: No such file or directory\n"):
        DataMix.of(tmp_path / "summary.json", None, None)
