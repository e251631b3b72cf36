"""Links out of README, docs and docstrings, as far as can be told without a network; `make links` opens them."""

import re
from urllib.parse import urlsplit

import pytest
from helpers import ROOT

TEXTS = [
    ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CITATION.cff",
    ROOT / "pyproject.toml", ROOT / "Makefile", *(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.ipynb"),
    *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.py"), *(ROOT / "configs").glob("*.yaml"),
    *(ROOT / "lit_lipschitz").rglob("*.py"), *(ROOT / "cli").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"),
]  # fmt: skip
LIGHTNING = "https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch"
KNOWN = {
    "https://arxiv.org/abs/1502.01852",
    "https://arxiv.org/abs/1609.02907",
    "https://arxiv.org/abs/1810.10082",
    "https://arxiv.org/abs/1812.03981",
    "https://arxiv.org/abs/1812.06162",
    "https://arxiv.org/abs/1902.07399",
    "https://arxiv.org/abs/1903.05499",
    "https://arxiv.org/abs/2002.11803",
    "https://arxiv.org/abs/2404.00498",
    "https://arxiv.org/abs/2405.15682",
    f"{LIGHTNING}.cli.LightningCLI.html",
    f"{LIGHTNING}.callbacks.ModelCheckpoint.html",
    f"{LIGHTNING}.trainer.trainer.Trainer.html",
    "https://docs.pytorch.org/docs/stable/optim.html",
    "https://download.pytorch.org/whl/cpu",
    "https://github.com/fabian-sp/step-back",
    "https://github.com/fabian-sp/step-back/blob/main/stepback/records/mnist_mlp.csv",
    "https://github.com/facebookresearch/schedule_free/blob/main/examples/mnist/README.md",
    "https://github.com/fsschneider/DeepOBS",
    "https://github.com/mlcommons/algorithmic-efficiency",
    "https://github.com/pytorch/examples",
    "https://github.com/tkipf/gcn",
}
"""The pages that are linked. Look at a new one before it comes in here."""
PAPERS = {
    "1902.07399": "A novel adaptive learning rate scheduler for deep neural networks",
    "2006.13307": "LALR: Theoretical and Experimental validation of Lipschitz Adaptive Learning Rate in Regression and "
    "Neural Networks",
    "1910.04209": "On the adequacy of untuned warmup for adaptive optimization",
    "2002.11803": "Disentangling Adaptive Gradient Methods from Learning Rates",
    "2404.00498": "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
    "2405.15682": "The Road Less Scheduled",
    "1502.01852": "Delving Deep into Rectifiers",
    "1812.03981": "Theoretical Analysis of Auto Rate-Tuning by Batch Normalization",
    "1810.10082": "A Continuous-Time View of Early Stopping for Least Squares",
    "1812.06162": "An Empirical Model of Large-Batch Training",
    "1506.01186": "Cyclical Learning Rates for Training Neural Networks",
    "1412.6980": "Adam",
    "1608.06993": "Densely Connected Convolutional Networks",
    "1603.05027": "Identity Mappings in Deep Residual Networks",
    "1512.03385": "Deep Residual Learning for Image Recognition",
}
"""Numbers of arXiv and how their papers' titles begin; the first one's is that of its first version."""


def text_of(path):
    """A file's text; where strings go on in a line of their own, as one."""
    return re.sub(r'"\n\s*f?"', "", path.read_text(encoding="utf-8"))


def links():
    for path in TEXTS:
        for url in re.findall(r"https?://[^\s)>\"'`]+", text_of(path)):
            if not re.match(r"http://(localhost|www\.w3\.org/)", url):  # a server's own address; the name of SVG
                yield path.relative_to(ROOT).as_posix(), url.rstrip(".,;:")


def test_every_link_is_a_known_one():
    found = list(links())
    for path, url in found:
        assert url in KNOWN, f"{path}: open {url}, and add it to KNOWN if it is what it is said to be"
    assert {url for _, url in found} == KNOWN, "no longer linked"


@pytest.mark.parametrize("url", sorted(KNOWN))
def test_links_are_of_pages_that_stay(url):
    parts = urlsplit(url)
    assert parts.scheme == "https"
    assert parts.netloc == parts.hostname
    assert not parts.query
    # A version's page goes stale, and a page's section is renamed more easily than the page.
    assert not parts.fragment
    assert "/latest/" not in parts.path


def test_a_paper_has_one_number():
    mentioned = set()
    for path in TEXTS:
        text = " ".join(text_of(path).split())
        for label, number in re.findall(r"\[arXiv ([\w.]+)\]\(https://arxiv\.org/abs/([\w.]+)\)", text):
            assert label == number, path
        for number in re.findall(r"arXiv[ :]?(\d{4}\.\d{4,5})", text):
            assert number in PAPERS, f"{path}: look up arXiv {number}, and add it to PAPERS"
            mentioned.add(number)
        for title, number in re.findall(r": ([A-Z][^:.]{3,90}), arXiv (\d{4}\.\d{4,5})", text):
            assert PAPERS[number].startswith(title), f"{path}: {title}"
    assert mentioned == set(PAPERS)


def test_the_network_is_asked_by_a_target_that_fails():
    recipe = re.search(r"^links:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert "-b linkcheck" in recipe
    assert "docs" in recipe.split()
    assert "`make links`" in (ROOT / "CONTRIBUTING.md").read_text()
