"""What may go wrong while a run trains, and costs it nothing: a step that is not finite, a signal, a full disk.

    guard = Guard(model, run / "skipped.jsonl")
    guard.remember()                        # before the forward
    ...                                     # forward, losses, backward, clip
    if all_finite(numbers):                 # asked once a step
        optimizer.step()
    else:
        guard.restore()                     # batch norms as before; weights and optimiser were not touched
        guard.record(step=..., first_not_finite=guard.first_not_finite(batch, forward, weigh))

In a file of its own so that the loop of train.py stays a plain loop: looking for the culprit takes more lines than the
step itself and runs only once a step has failed. Needs torch only and imports no other file of this project: copy it
and it works.
"""

import contextlib
import json
import math
import os
import signal
from pathlib import Path

import torch

MAX_SKIPPED_IN_A_ROW = 10


def all_finite(numbers):
    """True where a step may be taken: every one of these floats is finite.

    The one place where that is decided. Training in several processes, give it the means over them (ranks.mean): one
    number that is not finite in one process makes its mean so in all, and all skip alike.
    """
    return all(map(math.isfinite, numbers))


class Guard:
    """Leaves a model as it was before a failed step, finds what failed and writes it down.

    Args:
        model: any nn.Module.
        path:  of the records, one JSON object a line; made with the first. None: nothing is written.
    """

    def __init__(self, model, path):
        self.model, self.path = model, path
        # where each module keeps its buffers: model.buffers() would look for them again in every step
        self.places = [module._buffers for module in model.modules() if module._buffers]
        self.buffers, self.saved = [], []  # statistics of the batch norms, above all; the forward changes them

    def remember(self):
        """Before a forward: keep the buffers and the random state that it starts from."""
        buffers = [buffer for place in self.places for buffer in place.values() if buffer is not None]
        if list(map(id, buffers)) != list(map(id, self.buffers)):  # the first time, or a module has put others in place
            self.buffers, self.saved = buffers, [buffer.clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self.saved, buffers)  # one call: a hundred small copies would cost ten times that
        self.random = torch.get_rng_state()

    def restore(self):
        """The buffers as they were; or one NaN in a running mean would spoil every evaluation from here on.

        A buffer that the forward itself replaced (a rotary table for another image size) stays: it holds no statistics.
        """
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.saved)

    def first_not_finite(self, batch, forward, weigh=None):
        """Run a failed step again, without a trace, and name the first thing in it that is not finite.

        Args:
            batch:   dict; its tensors are looked at first.
            forward: function of the batch -> dict of loss terms, as in the step.
            weigh:   function of these terms -> loss, to look at it and its gradient too; None where the step's loss was
                     not finite.

        Returns:
            str: "input color", "weight unet.stem.weight", "output of unet.stem" (inner modules before those that hold
            them), "loss term alignment", "weighted loss", "gradient of semantic_head.weight" (in the order of the
            backward), or that the second try was finite.
        """
        named = [(f"input {key}", value) for key, value in batch.items()]
        named += [(f"weight {name}", value) for name, value in self.model.state_dict(keep_vars=True).items()]
        for name, value in named:
            if not _is_finite(value):
                return name
        found = []

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
                loss = weigh(terms)
                if not _is_finite(loss):
                    return "weighted loss"
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
        """Add a line to the records: valid JSON, numbers that are not finite as "nan", "inf", "-inf". Returns it."""
        line = json.dumps(_writable(fields), allow_nan=False)
        if self.path is not None:
            append_line(self.path, line)
        return line


def blame(found):
    """Of what several processes found in one failed step, a dict each, the fields of its record.

    Args:
        found: list of {"scenes": list of str, "first_not_finite": what Guard.first_not_finite gave}, one a process.

    Returns:
        dict of all scenes and the first_not_finite of a process that found something; of several processes also
        processes, found itself.
    """
    culprit = next((one for one in found if not one["first_not_finite"].startswith("not found")), found[0])
    fields = {"scenes": [name for one in found for name in one["scenes"]],
              "first_not_finite": culprit["first_not_finite"]}
    return fields | ({"processes": found} if len(found) > 1 else {})


def _tensors(value):
    """All tensors in a module's output: a tensor, a sparse tensor (`features`), dicts, lists and tuples of them."""
    if torch.is_tensor(value):
        yield value
    elif torch.is_tensor(getattr(value, "features", None)):  # spconv
        yield value.features
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _is_finite(value):
    """True where all floating-point tensors in a module's output are finite."""
    return all(torch.isfinite(t).all() for t in _tensors(value) if t.is_floating_point())


def _writable(value):
    """Nested fields with every float that is not finite as text."""
    if isinstance(value, dict):
        return {key: _writable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path):
    """Open a file for writing bytes beside path, renamed to path once it is whole and on the disk.

    So path holds either the old or the new content, whenever the process is killed; a failed write leaves nothing.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save says "unexpected pos"
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def cut_half_line(path):
    """Cut off the half line that a killed process left at the end of a file of lines, if there is such a file."""
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)  # in place: the whole lines are never rewritten


def append_line(path, line):
    """Add a line of text to a file, on a line of its own even where a killed run left half a line, and on the disk."""
    cut_half_line(path)
    with open(path, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------ signals


class Stopped(Exception):
    """A signal asked the run to end, and everything up to here is saved."""


class StopSignals:
    """SIGINT (Ctrl-C) and SIGTERM ask for a stop, which the loop makes at its next whole step; a second one kills.

    Args:
        agree: of several processes that train together, the largest of the numbers that each gives it (ranks.largest).
        quiet: say nothing when a signal comes: another process does.

    Attributes:
        asked: number of the signal, 0 until one came.
    """

    def __init__(self, agree=int, quiet=False):
        self.asked, self.before, self.agree, self.quiet = 0, {}, agree, quiet

    def listen(self):
        """From here on a signal asks instead of ending the process."""
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self):
        """Signals do again what they did before `listen`."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _ask(self, number, frame):
        self.asked = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # a DataLoader would raise in the middle of a step where its workers were told to end as well
        signal.signal(signal.SIGCHLD, lambda *_: None)
        if not self.quiet:  # print may be what was interrupted
            os.write(2, b"\nstopping after this step; once more to end at once\n")

    def agreed(self):
        """Number of a signal that came to any of the processes, 0 for none: the same in all, which must all ask."""
        number = self.agree(self.asked)
        if number:  # else one may have come this moment
            self.asked = number
        return number

    def until_agreed(self, items):
        """As `until`, for items of which every process has equally many: all stop before the same one."""
        items = self.until(items)
        while True:
            item = next(items, None)
            if self.agreed() or item is None:
                return
            yield item

    def until(self, items):
        """The items, up to a stop; none is fetched after it."""
        if self.asked:  # no worker starts either
            return
        items = iter(items)
        while not self.asked:
            try:
                item = next(items)
            except StopIteration:
                return
            except RuntimeError:
                if self.asked:  # the worker that was to bring it has ended
                    return
                raise
            yield item
