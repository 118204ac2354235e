"""A step that is not finite: skipped, undone, named, recorded. It costs the run nothing else.

    guard = Guard(model, run / "skipped.jsonl")
    guard.remember()                        # before the forward
    ...                                     # forward, losses, backward, clip
    if guard.accepts(numbers):              # asked once a step
        optimizer.step()
    else:
        guard.restore()                     # batch norms as before; weights and optimiser were not touched
        culprit = guard.first_not_finite(batch, forward, weigh)
        guard.record(epoch=epoch, step=step, first_not_finite=culprit)

Looking for the culprit takes more lines than the step and runs only once a step has failed; so the loop stays plain.
Needs torch only and imports no other file of this project: copy it and it works.
"""

import json
import math

import torch

MAX_SKIPPED_IN_A_ROW = 10
SPIKE, RECENT = 7.0, 100  # a loss so many deviations above the mean of the last so many is a spike


class Diverged(Exception):
    """Diverged(number of steps refused in a row, what `first_not_finite` found in the last of them)."""
    def __str__(self):
        return "{} steps in a row were not finite: {}".format(*self.args)


class Guard:
    """Leaves a model (any nn.Module) as it was before a failed step, finds what failed and writes it down.

    path: of the records, one JSON object a line; None: nothing is written.  skipped_in_a_row: steps refused since the
    last that was taken.  recent: the losses of the last RECENT steps.
    """

    def __init__(self, model, path=None):
        self.model, self.path, self.skipped_in_a_row, self.recent = model, path, 0, []
        # where each module keeps its buffers: model.buffers() would look for them again in every step
        self.places = [module._buffers for module in model.modules() if module._buffers]
        self.buffers, self.saved = [], []  # statistics of the batch norms, above all; the forward changes them

    def remember(self):
        """Keep the buffers and the random state that the forward starts from."""
        buffers = [buffer for place in self.places for buffer in place.values() if buffer is not None]
        if list(map(id, buffers)) != list(map(id, self.buffers)):  # the first time, or a module has put others in place
            self.buffers, self.saved = buffers, [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self.saved, buffers)  # one call: a hundred small copies would cost ten times that
        self.random = torch.get_rng_state()

    def accepts(self, numbers):
        """True where a step may be taken: all numbers (floats: loss, terms, gradient norms) are finite. Of several
        processes give it the means: one that is not finite makes the mean so, and all skip alike."""
        finite = all(map(math.isfinite, numbers))
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        return finite

    def gives_up(self):
        """True once MAX_SKIPPED_IN_A_ROW steps in a row were refused."""
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def is_spike(self, loss):
        """True where a loss lies SPIKE deviations above the mean of the RECENT before it; False until there are 20."""
        recent, self.recent = torch.tensor(self.recent), [*self.recent[1 - RECENT:], loss]
        return len(recent) >= 20 and loss > recent.mean() + SPIKE * recent.std()

    def restore(self):
        """The buffers as they were, or one NaN in a running mean would spoil every evaluation from here on. A buffer
        that the forward itself replaced (a rotary table for another image size) stays: it holds no statistics."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.saved)

    def first_not_finite(self, batch, forward, weigh=None):
        """Run a failed step again, without a trace, and name the first thing in it that is not finite.

        Args:
            batch:   dict; its tensors are looked at first.
            forward: function of the batch -> dict of loss terms, as in the step.
            weigh:   function of these terms -> loss, whose gradient is looked at too; None: the loss was not finite.

        Returns "input color", "weight unet.stem.weight", "output of unet.stem" (inner modules before those that hold
        them), "loss term alignment", "weighted loss", "gradient of semantic_head.weight" (in the order of the
        backward), or that the second try was finite.
        """
        named = [(f"input {key}", value) for key, value in batch.items()]
        named += [(f"weight {name}", value) for name, value in self.model.state_dict(keep_vars=True).items()]
        found = [name for name, value in named if not _is_finite(value)]
        if found:
            return found[0]

        def look(name, value):
            if not found and not _is_finite(value):
                found.append(name)

        hooks = [module.register_forward_hook(lambda module, args, out, name=name: look(f"output of {name}", out))
                 for name, module in self.model.named_modules()]
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        try:
            with torch.random.fork_rng(devices=[]):  # the model draws on the CPU alone
                torch.set_rng_state(self.random)
                terms = forward(batch)
                for name, term in terms.items():
                    look(f"loss term {name}", term)
                if weigh is None or found:
                    return found[0] if found else "weighted loss"
                look("weighted loss", loss := weigh(terms))
                if not found:
                    hooks += [p.register_hook(lambda grad, name=name: look(f"gradient of {name}", grad))
                              for name, p in trained]
                    # not .backward(): it would add to .grad
                    gradients = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
                    for (name, _), gradient in zip(trained, gradients):
                        if gradient is not None:
                            look(f"norm of the gradient of {name}", gradient.norm())
        except RuntimeError as error:  # out of memory, most likely: the run itself goes on
            return f"not found, the second try failed: {str(error).splitlines()[0]}"
        finally:
            for hook in hooks:
                hook.remove()
            self.restore()
        return found[0] if found else "not found, the second try was finite"

    def record(self, **fields):
        """Add a line to the records: valid JSON, floats that are not finite as "nan", "inf", "-inf". Returns it."""
        line = json.dumps({key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
                           for key, value in fields.items()}, allow_nan=False)
        if self.path is not None:
            with open(self.path, "ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)  # half a line that a kill left
                file.write(line.encode() + b"\n")
        return line


def _is_finite(value):
    """True where all numbers in a module's output are finite: a tensor, spconv's, dicts, lists and tuples of them."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    value = getattr(value, "features", value)  # spconv
    return not (torch.is_tensor(value) and value.is_floating_point()) or bool(torch.isfinite(value).all())
