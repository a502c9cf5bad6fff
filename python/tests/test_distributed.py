# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel over gloo, in two processes: the gradients of the joint batch."""

import datetime
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from models import make_batch, make_model  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import sebp  # noqa: E402

PROCESSES = 2
SECONDS = 150
STEPS = 3
CASES = {
    "bert": dict(name="bert"),
    "bert, mask": dict(name="bert", padding=True),
    "llama": dict(name="llama"),
    "llama, one process without active rows": dict(name="llama", idle=True),
    "gpt2, mask, one process without active rows": dict(name="gpt2", idle=True, padding=True),
}


def joint_batch(name, step, idle):
    """Make the batch of all processes; `idle`: the texts of the last are not in the loss."""
    batch = make_batch(name, step, batch=8)
    if idle:
        batch["labels"][4:] = -100
    return batch


def loss_of(model, batch, terms):
    """Give a loss whose terms, of all processes together, are averaged."""
    labels = batch["labels"]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / terms


def terms_of(batch):
    labels = batch["labels"]
    return int(((labels[:, 1:] if labels.dim() == 2 else labels) >= 0).sum())


def train(model, name, idle, part=slice(None), processes=1):
    """Take steps, and give the gradients of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    gradients = []
    for step in range(STEPS):
        batch = joint_batch(name, step, idle)
        # DDP divides by the number of processes.
        loss = loss_of(model, {k: v[part] for k, v in batch.items()}, terms_of(batch) / processes)
        optimizer.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return gradients


def refused_step(net, optimizer):
    """Try a step of sparse layers; give what was said, and whether nothing has moved."""
    before = [parameter.detach().clone() for parameter in net.parameters()]
    net(torch.ones(3, 4)).sum().backward()
    said = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        said = str(error)
    return said, all(map(torch.equal, before, net.parameters()))


def work(rank, folder):
    """Train each case on one process's part."""
    torch.set_num_threads(1)
    net = torch.nn.Linear(4, 5)
    adamw = torch.optim.AdamW(net.parameters(), lr=0.1)
    early = sebp.apply_meprop_to_model(net, adamw, 3, "*")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=SECONDS // 2),
    )
    part = slice(4 * rank, 4 * rank + 4)
    results = {"early": refused_step(net, early)}
    for key, case in CASES.items():
        model = make_model(case["name"])
        sebp.apply_sebp_to_model(model, padding=case.get("padding", False))
        parallel = DistributedDataParallel(model)
        if rank == 0:
            # Which the other process does not notice.
            sebp.profile(parallel, make_batch(case["name"], 0))
        before = sum(done.active for done in sebp.torch.common.work.work_done().values())
        gradients = train(parallel, case["name"], case.get("idle"), part, PROCESSES)
        after = sum(done.active for done in sebp.torch.common.work.work_done().values())
        results[key] = {
            "gradients": gradients,
            "parameters": [p.detach() for p in model.parameters()],
            "active": after - before,
        }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run the processes once for all cases; whatever happens, none is left behind."""
    folder = tmp_path_factory.mktemp("distributed")
    processes = torch.multiprocessing.spawn(work, (str(folder),), PROCESSES, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, f"not done after {SECONDS} s"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def test_sparse_layers_made_before(results):
    """Processes that came together after layers were made sparse are noticed in the step."""
    for result in results:
        said, is_unmoved = result["early"]
        assert "not summed over processes" in said
        assert is_unmoved


@pytest.mark.parametrize("key", CASES)
def test_gradients_of_the_joint_batch(results, key):
    name, idle = CASES[key]["name"], CASES[key].get("idle", False)
    plain = make_model(name)
    want = train(plain, name, idle)
    first, second = (result[key] for result in results)
    for step in range(STEPS):
        assert any(gradient.any() for gradient in want[step])
        torch.testing.assert_close(first["gradients"][step], want[step], rtol=1e-3, atol=1e-5)
        assert all(map(torch.equal, first["gradients"][step], second["gradients"][step]))
    torch.testing.assert_close(
        first["parameters"], [p.detach() for p in plain.parameters()], rtol=1e-3, atol=1e-4
    )
    assert all(map(torch.equal, first["parameters"], second["parameters"]))


@pytest.mark.parametrize("key", CASES)
def test_rows_of_each_process(results, key):
    active = [result[key]["active"] for result in results]
    assert active[0] > 0
    assert (active[1] == 0) == CASES[key].get("idle", False)
