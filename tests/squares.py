"""A classifier of bright squares in corners, trained in a second: small, and it has learnt."""

import numpy as np
import torch
import torch.nn.functional as F

from edgekd.runtimes import Outputs

CORNERS = [(0, 0), (0, 12), (12, 0), (12, 12)]  # top left of the 12 px square of each class


def squares(n, seed=0):
    """(n, 3, 24, 24) float32 noise with a bright square in the corner that is its label (n,)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.3, (n, 3, 24, 24)).astype(np.float32)
    labels = rng.integers(4, size=n)
    for i, label in enumerate(labels):
        top, left = CORNERS[label]
        x[i, :, top + 3 : top + 9, left + 3 : left + 9] += 2
    return x, labels


class Net(torch.nn.Module):
    def __init__(self, activation=F.relu, width=24):
        super().__init__()
        self.activation = activation
        self.stem = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.body = torch.nn.Conv2d(8, width, 3, 2, 1)
        self.head = torch.nn.Linear(width * 9, 4)

    def features(self, x):
        return self.activation(self.body(self.activation(self.stem(x))))

    def forward(self, x):
        return self.head(F.avg_pool2d(self.features(x), 2).flatten(1))


def session(net, scale=1.0, shift=0.0):
    @torch.no_grad()
    def run(images):
        x = torch.from_numpy(images)
        return Outputs((net(x) * scale + shift).numpy(), net.features(x).numpy())

    return run


def fit(net):
    """A second's training on `squares`."""
    images, labels = squares(128)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def trained(activation=F.relu):
    """Trained for a second on `squares`; (N, 24, 6, 6) features, two of the channels flat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fastest for a net this small
    torch.manual_seed(0)
    net = Net(activation)
    with torch.no_grad():
        net.body.weight[:2] = 0
        net.body.bias[0], net.body.bias[1] = -1, 0.5  # all zeros; all 0.5
    net.body.weight.register_hook(lambda g: g * (torch.arange(24) >= 2)[:, None, None, None])
    net.body.bias.register_hook(lambda g: g * (torch.arange(24) >= 2))
    fit(net)
    torch.set_num_threads(threads)
    return net.eval()
