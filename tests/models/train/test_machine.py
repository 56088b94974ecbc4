"""The machine's name."""

from __future__ import annotations

from models.train.machine import cpu_model, this_machine


def test_the_machine_has_a_name(tmp_path) -> None:
    assert str(this_machine().num_cores) in str(this_machine())
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert cpu_model(tmp_path / "missing")
