"""A controller's state as an engine would tell it."""

from __future__ import annotations

from server.engine.messages import CalibrationCell, ControllerState, CurvePoint, Decision, Duelled, Speedup

STATE = ControllerState(
    run_curve=(CurvePoint(1, 0.01), CurvePoint(16, 0.02)),
    draft_curve=(CurvePoint(2, 0.003),),
    rest_curve=(CurvePoint(4, 0.0005),),
    tree_curve=(CurvePoint(8, 0.0007),),
    extra_seconds=(("keys", 1e-8), ("sampled rows", 5e-5)),
    calibration=(CalibrationCell("greedy", 1, 2, 0.25, 0.375, 40.0),),
    calibration_error=0.0625,
    speedups=(Speedup("1", 1.75, 1.5, 2.0, 300.0, 3.0), Speedup("all", 1.25, 1.125, 1.375, 900.0, 8.0)),
    duels=(Duelled("3-4", 0.875, 7, has_won=False),),
    decisions=(
        Decision(2, 3, 2, 20, 8, 0.25, 4.5, is_control=False),
        Decision(4, 5, 1, 30, 0, None, 5.5, is_control=False),
        Decision(9, 9, 0, 0, 0, None, 9.0, is_control=True),
    ),
)
