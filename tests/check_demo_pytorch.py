# SPDX-License-Identifier: Apache-2.0
"""Compare finetune_bert's losses with those of the same model in PyTorch.

``finetune_bert --dump-parameters DIR --csv FILE`` writes its initial parameters, its batches and
its settings. From them this builds the model out of torch.nn.functional, takes the same AdamW
steps with autograd's gradients, and compares the loss of every step.

Usage: check_demo_pytorch.py DIR FILE
Exit status: 0 if every loss agrees to a relative 1e-4, 1 if one does not, 2 without PyTorch.
"""

import csv
import sys
from pathlib import Path

try:
    import torch
    import torch.nn.functional as nn
except ImportError:
    sys.exit(2)

TOLERANCE = 1e-4

Tensors = dict[str, torch.Tensor]


def read_settings(folder: Path) -> dict[str, float]:
    """Read settings.txt.

    Parameters
    ----------
    folder : Path
        What --dump-parameters wrote.

    Returns
    -------
    dict of str to float
        The value of each setting.
    """
    lines = (folder / "settings.txt").read_text(encoding="ascii").splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}


def read_tensors(folder: Path) -> Tensors:
    """Read the initial parameters.

    Parameters
    ----------
    folder : Path
        What --dump-parameters wrote.

    Returns
    -------
    dict of str to torch.Tensor
        Each tensor under its name, ready for autograd; a single row as a vector.
    """
    values = torch.frombuffer(
        bytearray((folder / "parameters.f32").read_bytes()), dtype=torch.float32
    )
    tensors: Tensors = {}
    offset = 0
    for line in (folder / "tensors.txt").read_text(encoding="ascii").splitlines():
        name, rows, cols = line.split()[0], *map(int, line.split()[1:])
        tensor = values[offset : offset + rows * cols].reshape(rows, cols).clone()
        offset += rows * cols
        vector = name.endswith((".bias", ".scale", ".shift"))
        tensors[name] = (tensor[0] if vector else tensor).requires_grad_()
    if offset != len(values):
        sys.exit(f"parameters.f32 holds {len(values)} values, tensors.txt lists {offset}")
    return tensors


def read_batches(
    folder: Path, length: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Read batches.txt.

    Parameters
    ----------
    folder : Path
        What --dump-parameters wrote.
    length : int
        The length to pad to.

    Returns
    -------
    list of tuple of torch.Tensor
        For each step the ids (B x L), the mask of real tokens (B x L) and the labels (B).
    """
    steps: dict[int, list[list[int]]] = {}
    for line in (folder / "batches.txt").read_text(encoding="ascii").splitlines():
        step, *rest = map(int, line.split())
        steps.setdefault(step, []).append(rest)
    batches = []
    for _, lines in sorted(steps.items()):
        ids = torch.tensor([line[1:] + [0] * (length - len(line) + 1) for line in lines])
        mask = torch.tensor([[i < len(line) - 1 for i in range(length)] for line in lines])
        batches.append((ids, mask, torch.tensor([line[0] for line in lines])))
    return batches


def forward(
    t: Tensors, layers: int, heads: int, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Compute the logits.

    Parameters
    ----------
    t : dict of str to torch.Tensor
        The parameters.
    layers, heads : int
        The shape of the encoder.
    ids, mask : torch.Tensor
        Of one batch, B x L each.

    Returns
    -------
    torch.Tensor
        B x classes.
    """

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.layer_norm(x, x.shape[-1:], t[f"{name}.scale"], t[f"{name}.shift"], eps=1e-12)

    count, length = ids.shape
    x = norm(t["token.0.weight"][ids] + t["position.0.weight"], "embedding.0")
    for i in range(layers):
        qkv = linear(x, f"qkv.{i}").reshape(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        context = nn.scaled_dot_product_attention(*qkv, attn_mask=mask[:, None, None, :])
        context = context.transpose(1, 2).reshape(count, length, -1)
        x = norm(x + linear(context, f"out.{i}"), f"after_out.{i}")
        activated = nn.gelu(linear(x, f"up.{i}"))
        x = norm(x + linear(activated, f"down.{i}"), f"after_down.{i}")
    return linear(torch.tanh(linear(x[:, 0], "pooler.0")), "classifier.0")


def main() -> int:
    """Compare, and print one line.

    Returns
    -------
    int
        The exit status.
    """
    folder, losses_file = Path(sys.argv[1]), Path(sys.argv[2])
    settings, t = read_settings(folder), read_tensors(folder)
    if settings["dropout"] != 0:
        sys.exit("trained with dropout, whose random numbers PyTorch does not have")
    with losses_file.open(encoding="ascii") as file:
        rows = list(csv.reader(file))
    columns = [[float(value) for value in column] for column in zip(*rows[1:], strict=True)][1:]
    batches = read_batches(folder, int(settings["length"]))
    if not columns or len(batches) != len(columns[0]) or not batches:
        sys.exit(f"{len(batches)} batches, but {len(rows) - 1} losses")

    decays = [tensor for tensor in t.values() if tensor.dim() == 2]
    others = [tensor for tensor in t.values() if tensor.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decays, "weight_decay": settings["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["epsilon"],
    )
    worst = 0.0
    for step, (ids, mask, labels) in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = settings[f"rate.{step}"]
        loss = nn.cross_entropy(
            forward(t, int(settings["layers"]), int(settings["heads"]), ids, mask), labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for column in columns:
            error = abs(column[step - 1] - loss.item()) / abs(loss.item())
            worst = error if not error <= worst else worst
    print(
        f"{len(batches)} steps, modes {', '.join(rows[0][1:])}: losses within {worst:.1e} of PyTorch's"
    )
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
