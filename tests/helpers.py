"""What the tests of several modules share; the fixtures are in conftest."""

import numpy as np
import torch

from labkit.batching import Example

IDS = torch.arange(5, 29).reshape(2, 12)
LLAMA_2_7B = dict(model_type="llama", hidden_size=4096, intermediate_size=11008)


def example(ids, prompt):
    """Token ids, of which those after the first `prompt` are a response."""
    return Example(np.array(ids), (np.arange(len(ids)) >= prompt).astype(np.int64))


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model(input_ids=ids, **inputs).logits


@torch.no_grad()
def randomize(model, std=0.05, seed=1):
    """Adapters as after training: what starts at zero no longer is."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=std)
    return model


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, loss, expected):
    """Two losses of a model and all their gradients agree, these to 2e-5 of the largest."""
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name] / scale, gradient / scale, atol=2e-5, rtol=0, msg=name
        )
