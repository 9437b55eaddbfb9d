"""adapter_config.json, written and read."""

from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.peft_config import ADAPTER_CONFIG, read_config, write_config
from megavlm.convert.peft_names import rank_of, scale_of
from megavlm.model.shapes import Shapes


def test_patterns_keep_their_order(dense, tmp_path):
    """The first that matches counts, for peft, too."""
    shapes, name = Shapes.from_hf(dense), "model.language_model.layers.0.self_attn.v_proj"
    patterns = {"rank_pattern": {"v_proj": 4, ".*_proj": 2}, "alpha_pattern": {"v_proj": 3.0, ".*_proj": 5.0}}
    adapter = AdapterSettings(type="lora", targets=["q_proj", "v_proj"], **patterns)
    write_config(tmp_path / ADAPTER_CONFIG, adapter, shapes)
    read = read_config(tmp_path, shapes)
    assert rank_of(read, name) == 4
    assert scale_of(read, name) == 3 / 4
