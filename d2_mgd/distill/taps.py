"""Feature taps: named maps out of any module, after or before the activation, by hooks.

Nothing of the tapped model is changed: no attribute, no file, no second forward.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2_mgd.distill.activations import ActivationWatch
from d2_mgd.errors import UserError

__all__ = ["FeatureTaps", "Tap"]


@dataclass(frozen=True)
class Tap:
    """Where a map is taken.

    Args:
        module: dotted path of a module from the root of the tapped model; "" is the root itself.
        key: which entry of the module's output, where that is a dict or a sequence.
        before_activation: take the input of the last activation inside the module instead of the module's output,
            which must be the result of that activation. Works for residual blocks (Detectron2, torchvision, timm),
            convolution-norm-activation blocks, and activations themselves, in place or not, functional or not.
    """

    module: str
    key: str | int | None = None
    before_activation: bool = False

    def __post_init__(self) -> None:
        if self.before_activation and self.key is not None:
            raise UserError(f"tap of {self.module!r}: key and before_activation exclude each other.")


class FeatureTaps:
    """Takes named maps while a model runs.

    ::

        taps = FeatureTaps(model, {"stage3": "layer3", "stage4": Tap("layer4.2", before_activation=True)})
        output = model(images)
        maps = taps.collect()  # {"stage3": (N, C3, H3, W3), "stage4": (N, C4, H4, W4)}
        maps = taps.run(images)  # the same maps, and the forward ends at the deepest of them
        with taps.each(use):  # use("stage3", map) while the model runs, so that no map waits for the others
            output = model(images)

    Maps carry gradients as the model's own tensors do. A map that the model goes on to change in place is copied; the
    first forward in each mode finds out which ones are. Hooks sit on the model's submodules, so the model may be
    wrapped in DDP or DataParallel, before or after; each thread has its own maps. Under ``torch.compile`` hooks break
    the graph and give the same maps; ``fullgraph=True`` refuses them. A copy of the model (an average of its weights,
    say) is not tapped, nor is one that was pickled; a copy of the taps taps the copy of the model.

    Args:
        model: the root; paths are relative to it.
        taps: feature name -> path or :class:`Tap`.

    Raises:
        ValueError: no tap at all, or a path that is not in the model; the message lists what is there.
    """

    def __init__(self, model: nn.Module, taps: Mapping[str, str | Tap]) -> None:
        if not taps:
            raise UserError("no feature to tap was given.")
        self.model = model
        self.taps = {name: Tap(tap) if isinstance(tap, str) else tap for name, tap in taps.items()}
        self._needs_copy: dict[tuple[str, bool, bool], bool] = {}  # by feature, training mode, early stop
        self._calls: dict[int, _Call] = {}  # by thread: DataParallel runs replicas side by side
        self._handles: list[Any] = [
            model.register_forward_pre_hook(_Hook(self._begin)),
            model.register_forward_hook(_Hook(self._end), always_call=True),
        ]
        by_module: dict[str, list[str]] = {}
        for name, tap in self.taps.items():
            by_module.setdefault(tap.module, []).append(name)
        try:
            for path, features in by_module.items():
                self._attach(_submodule(model, path), path, features)
        except UserError:
            self.remove()
            raise

    def _attach(self, module: nn.Module, path: str, features: list[str]) -> None:
        before = [name for name in features if self.taps[name].before_activation]
        after = [name for name in features if not self.taps[name].before_activation]
        if before:
            take = _Hook(self._take_before(path, before))
            self._handles.append(module.register_forward_pre_hook(_Hook(self._watch_activation)))
            # before the hooks of earlier taps, because the watch that began last ends first
            self._handles.append(module.register_forward_hook(take, prepend=True, always_call=True))
        if after:
            self._handles.append(module.register_forward_hook(_Hook(self._take_after(path, after))))

    # ---- maps out

    @property
    def removed(self) -> bool:
        """Whether :meth:`remove` has taken the hooks off the model."""
        return not self._handles

    @property
    def hold_maps(self) -> bool:
        """Whether the model has run in this thread since the last :meth:`collect`."""
        return threading.get_ident() in self._calls

    def collect(self) -> dict[str, Tensor]:
        """The maps of the newest forward in this thread; the taps let go of them.

        Raises:
            RuntimeError: a tapped module did not run, or a map was changed in place since.
        """
        call = self._calls.pop(threading.get_ident(), None)
        taken = {} if call is None else call.taken
        missing = [name for name in self.taps if name not in taken]
        if missing:
            places = ", ".join(f"{name} ({self.taps[name].module or 'the model itself'})" for name in missing)
            raise RuntimeError(f"no map of {places}: the module did not run in the last forward.")
        return {name: self._checked(name, taken[name]) for name in self.taps}

    def run(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the model's forward as far as the deepest tap and no further; return the maps."""
        return self.run_in(self.model, *args, **kwargs)

    def run_in(self, replica: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """:meth:`run` in a replica of the model that DataParallel has made, which has the model's hooks."""
        thread = threading.get_ident()
        self._calls[thread] = _Call(stop=True)
        try:
            replica(*args, **kwargs)
        except _AllTaken:
            pass
        except BaseException:
            self._calls.pop(thread, None)  # else the next ordinary forward would end early too
            self._stop_watching_all()
            raise
        return self.collect()

    @contextmanager
    def each(self, use: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Within, this thread's next forward gives each map to ``use(name, map)`` as soon as it is there.

        The taps keep none, so that a map can be forgotten before the next one comes.

        Raises:
            RuntimeError: on leaving, as :meth:`collect` does; and whatever ``use`` raises.
        """
        thread = threading.get_ident()
        self._calls[thread] = _Call(use=use)
        try:
            yield
        except BaseException:
            self._calls.pop(thread, None)
            self._stop_watching_all()
            raise
        self.collect()

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        self._stop_watching_all()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureTaps:
        return FeatureTaps(copy.deepcopy(self.model, memo), self.taps)

    def __enter__(self) -> FeatureTaps:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _checked(self, name: str, taken: _Taken) -> Tensor:
        if taken.original is None:
            return taken.map
        changed = taken.original._version != taken.version
        if taken.map is not taken.original:  # a copy was made to find out
            self._needs_copy[(name, *taken.mode)] = changed
            return taken.map if changed else taken.original
        if changed:
            raise RuntimeError(f"the map of {name} was changed in place after it was taken; collect it sooner.")
        return taken.map

    # ---- hooks

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: Any) -> None:
        self._stop_watching_all()  # a Ctrl-C ends a forward without its hooks
        thread = threading.get_ident()
        old = self._calls.get(thread, _Call())
        self._calls[thread] = _Call(stop=old.stop, use=old.use, running=True)

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._calls.get(threading.get_ident())
        if call is not None:
            call.running = False

    def _take_after(self, path: str, features: list[str]) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for name in features:
                found = _entry(output, self.taps[name].key, path, name)
                mode = (module.training, self._call().stop)
                if found.is_inference():  # keeps no version to look at, so it is copied every time
                    self._keep(name, _Taken(found.clone(), None, None, mode))
                    continue
                taken = found.clone() if self._needs_copy.get((name, *mode), True) else found
                self._keep(name, _Taken(taken, found, found._version, mode))
            self._maybe_stop()

        return hook

    def _take_before(self, path: str, features: list[str]) -> Callable[..., None]:
        @torch.compiler.disable
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            watch = self._stop_watching(module)
            if output is None or watch is None:  # the forward was left by an exception
                return
            if watch.before is None or watch.after is not output:
                raise RuntimeError(
                    f"module {path!r} ({type(module).__name__}) does not end in an activation that could be seen, so "
                    f"there is no map before it for {', '.join(features)}: tap a module that does, or tap it as it is."
                )
            for name in features:
                self._keep(name, _Taken(watch.before, None, None, (module.training, self._call().stop)))
            self._maybe_stop()

        return hook

    @torch.compiler.disable
    def _watch_activation(self, module: nn.Module, args: Any) -> None:
        watch = ActivationWatch()
        _watches().append((self, module, watch))
        watch.__enter__()

    def _stop_watching(self, module: nn.Module) -> ActivationWatch | None:
        watches = _watches()
        if not watches or watches[-1][:2] != (self, module):
            return None
        watch = watches.pop()[2]
        watch.__exit__(None, None, None)
        return watch

    def _stop_watching_all(self) -> None:
        """End the watches of this thread that an interrupted forward has left running."""
        watches = _watches()
        while watches and watches[-1][0] is self:
            self._stop_watching(watches[-1][1])

    def _call(self) -> _Call:
        return self._calls.setdefault(threading.get_ident(), _Call())

    def _keep(self, name: str, taken: _Taken) -> None:
        call = self._call()
        if call.running and name in call.taken:
            raise RuntimeError(
                f"module {self.taps[name].module!r} of feature {name} ran several times in one forward; tap a module "
                "that runs once."
            )
        call.taken[name] = taken
        if call.use is not None:
            call.use(name, taken.map)
            if taken.original is None:  # nothing left to check, so nothing is kept
                taken.map = taken.map.new_empty(0)

    def _maybe_stop(self) -> None:
        call = self._call()
        if call.stop and len(call.taken) == len(self.taps):
            raise _AllTaken


class _Hook:
    """A hook that works on the module it was made for: a copied or unpickled one does nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    @torch.compiler.disable
    def __call__(self, *args: Any) -> None:
        if self.function is not None:
            self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class _AllTaken(Exception):
    """Ends a forward when every tapped map is there."""


@dataclass
class _Taken:
    map: Tensor
    original: Tensor | None  # what the model goes on with, to see whether it is changed in place
    version: int | None  # its counter of in-place changes
    mode: tuple[bool, bool]  # of the forward: training, early stop


class _Call:
    """One forward in one thread."""

    def __init__(
        self, stop: bool = False, use: Callable[[str, Tensor], None] | None = None, running: bool = False
    ) -> None:
        self.stop = stop
        self.use = use
        self.running = running
        self.taken: dict[str, _Taken] = {}


def _entry(output: Any, key: str | int | None, path: str, name: str) -> Tensor:
    if key is not None:
        try:
            output = output[key]
        except (KeyError, IndexError, TypeError) as error:
            kind = f"it has: {', '.join(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
            where = repr(path) if path else "the model"
            raise UserError(f"feature {name}: the output of {where} has no entry {key!r} ({kind}).") from error
    if not isinstance(output, Tensor):
        raise UserError(
            f"feature {name}: the output of {repr(path) if path else 'the model'} is a {type(output).__name__}, not a "
            "tensor; name an entry of it by key."
        )
    return output


def _submodule(model: nn.Module, path: str) -> nn.Module:
    found = model
    walked: list[str] = []
    for part in path.split(".") if path else []:
        children = dict(found.named_children())
        if part not in children:
            where = f"in {'.'.join(walked)!r}" if walked else "in the model"
            raise UserError(f"there is no module {path!r}: {where} there are: {', '.join(children) or 'none'}.")
        found = children[part]
        walked.append(part)
    return found


_watching = threading.local()


def _watches() -> list[tuple[FeatureTaps, nn.Module, ActivationWatch]]:
    """The running watches of this thread, in the order in which they were started."""
    if not hasattr(_watching, "stack"):
        _watching.stack = []
    return _watching.stack
