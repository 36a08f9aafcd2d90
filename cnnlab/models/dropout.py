"""The kinds of dropout, put into a network after it is made: its parameters keep their names."""

from __future__ import annotations

from torch import Tensor, nn

from cnnlab.protocols import ConvNet
from cnnlab.schema import DropoutKind
from cnnlab.torch_private import DropoutNd


class ClassicDropout(nn.Dropout):
    """Dropout that makes its scale good in evaluation (Srivastava et al. 2014, "Dropout", section 4).

    With p the rate and r ~ Bernoulli(1 - p): y = r·x in training, y = (1 - p)·x in evaluation, where PyTorch's
    (inverted) dropout has y = r·x / (1 - p) and y = x. Both evaluate at the mean of training; here that mean, and
    with it what the next layer gets, is 1 - p times as large.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, each value with a draw of its own."""
        kept = 1 - self.p
        return x * x.new_empty(x.shape).bernoulli_(kept) if self.training else x * kept


def set_dropout_kind(model: nn.Module, kind: DropoutKind, rate: float | None) -> None:
    """Gives a finished network, its head in place, the kind of dropout.

    `classic` takes the place of each `nn.Dropout`, at the rate that it has. `spatial` drops channels of the last
    feature map at `rate` (Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks",
    section 3.2); the network has been made with its own dropout at 0. Before global average pooling that equals
    dropout of the pooled vector; before flattening, and in front of a decoder, whole maps go where single
    values, which their neighbors repeat, would.

    Args:
        rate: as configured; `None` is the network's own.

    Raises:
        ValueError: the kind would change nothing, or the network has no map to drop channels of.
    """
    if kind is DropoutKind.spatial:
        _drop_channels(model, rate)
    if kind is DropoutKind.classic:
        _make_classic(model, rate)


def has_dropout(model: nn.Module) -> bool:
    """Whether any of its modules drops values out, at whatever rate."""
    return any(isinstance(module, DropoutNd) for module in model.modules())


def _make_classic(model: nn.Module, rate: float | None) -> None:
    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Dropout]
    if rate != 0 and not any(layer.p for _, layer in layers):
        raise ValueError(
            "`regularization.dropout_kind=classic`: this network has no dropout that could be of this kind; "
            "type regularization.dropout=0.5, or regularization.dropout_kind=inverted"
        )
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, ClassicDropout(layer.p))


def _drop_channels(model: nn.Module, rate: float | None) -> None:
    if rate is None:
        raise ValueError(
            "`regularization.dropout_kind=spatial`: expected a rate, for no network has its own; "
            "type regularization.dropout=0.2"
        )
    if not isinstance(model, ConvNet):
        raise ValueError(
            f"`regularization.dropout_kind=spatial`: {type(model).__name__} names no feature map to drop channels of; "
            "make it a cnnlab.protocols.ConvNet, or type regularization.dropout_kind=inverted"
        )
    model.drop_channels(rate)
