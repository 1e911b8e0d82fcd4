"""What is told about optimisation steps, and when a run is not worth going on."""

import math
from collections.abc import Mapping

from sds3d.errors import NonFiniteError
from sds3d.events.bus import Emit, StepDone, Warned

SKIPPED_STEPS_LIMIT = 50
EXPLODING_FACTOR = 1e3  # a gradient norm this many times its usual value is reported


class Watch:
    """Reports steps; with `stop` what would be a warning about gradients ends the run."""

    def __init__(self, *, stop: bool) -> None:
        self.stop = stop
        self.usual_norm: float | None = None  # slow average of the gradient norm, on a log scale

    def report(
        self,
        emit: Emit,
        step: int,
        steps: int,
        *,
        norm: float,
        nonfinite: int,
        unlearned: int,
        log: Mapping[str, float],
    ) -> None:
        """Tell `emit` about a step that is done.

        `nonfinite` and `unlearned` count the steps so far whose gradients on the scene, or on the rules' own
        parameters, were not finite.

        Raises:
            NonFiniteError: most steps were skipped, or one was and the run stops at that.
        """
        emit(StepDone(step=step, steps=steps, grad_norm=norm, log=log, nonfinite=nonfinite + unlearned))
        if self.stop and unlearned:
            raise NonFiniteError(
                f"step {step}: the rule's own loss is not finite (on_nonfinite: stop); lower its learning rate"
            )
        for count, what in ((nonfinite, "gradients"), (unlearned, "losses of the rule's own parameters")):
            if count >= SKIPPED_STEPS_LIMIT and count * 2 > step:
                raise NonFiniteError(
                    f"{count} of {step} steps had non-finite {what} and were skipped; "
                    "lower the learning rate or guidance.cfg_scale, or run with prior.dtype float32"
                )
        self._norm(emit, step, norm)

    def _norm(self, emit: Emit, step: int, norm: float) -> None:
        """Warn, or stop where the run says so, when the gradient norm leaves its usual range by far."""
        if not 0.0 < norm < math.inf:
            return
        usual = self.usual_norm
        if usual is not None and norm > EXPLODING_FACTOR * usual:
            message = (
                f"step {step}: the gradient norm {norm:.3g} is over {EXPLODING_FACTOR:g} times "
                f"its usual {usual:.3g}"
            )
            if self.stop:
                raise NonFiniteError(f"{message} (on_nonfinite: stop)")
            emit(Warned(message=message))
        self.usual_norm = norm if usual is None else usual**0.9 * norm**0.1
