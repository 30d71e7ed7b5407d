"""Data sets of the Hugging Face Hub, each pinned to the commit that its revision stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from olpack import progress
from olpack.errors import OlpackError, first_line
from olpack.installed import optional


@dataclass(frozen=True)
class HubSet:
    """One split of a data set on the Hub.

    Attributes:
        id: "user/name".
        split: such as "train", or a part of it as the `datasets` library writes it: "train[:1000]".
        revision: branch, tag or commit; None for the main branch.
        subset: the configuration, where the data set has several.
    """

    id: str
    split: str = "train"
    revision: str | None = None
    subset: str | None = None

    @property
    def label(self) -> str:
        """What its rows are named by: "user/name[train]", "user/name/subset[train]"."""
        return f"{'/'.join(filter(None, (self.id, self.subset)))}[{self.split}]"

    @cached_property
    def commit(self) -> str:
        """The commit that the revision stands for, from the Hub, or from its local cache where it cannot be reached. A commit is itself.

        Raises:
            OlpackError: there is no such data set or revision, or it is neither in the cache nor reachable.
        """
        if self.revision and re.fullmatch("[0-9a-f]{40}", self.revision):
            return self.revision
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with _failures(self):
            try:  # of the card, because the cache remembers which commit it was fetched at
                return Path(hf_hub_download(self.id, "README.md", repo_type="dataset", revision=self.revision)).parent.name
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                if commit := HfApi().dataset_info(self.id, revision=self.revision).sha:
                    return commit
                raise OlpackError(f"The Hugging Face Hub names no commit of the data set {self.id}.", "Name a commit as `revision`.") from None

    def rows(self) -> Iterator[dict]:
        """Every row, fetched where it is not in the local cache.

        Raises:
            OlpackError: there is no such split or subset, it is gated, or cannot be fetched.
        """
        with _failures(self), progress.task(f"fetching {self.id}"):
            import datasets

            datasets.disable_progress_bars()
            datasets.logging.set_verbosity_error()  # it would report that it took the latest version in the cache; here the commit decides
            rows = datasets.load_dataset(self.id, name=self.subset, split=self.split, revision=self.commit)
        if not any(self.commit in file["filename"] for file in rows.cache_files):  # without a network, `datasets` takes what it has
            raise OlpackError(
                f"{self.id} is in the local cache at another revision only, and the Hugging Face Hub cannot be reached.",
                "Connect once, or name the revision that is there.",
            )
        yield from rows


@contextmanager
def _failures(asked: HubSet) -> Iterator[None]:
    """Explain in one sentence why a data set could not be fetched."""
    optional("datasets", "Data sets of the Hub")
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"The data set {asked.id}"
    try:
        yield
    except RevisionNotFoundError:
        raise OlpackError(f"{name} has no revision {asked.revision}.", "Name one of its branches, tags or commits as `revision`.") from None
    except (GatedRepoError, RepositoryNotFoundError, DatasetNotFoundError, HFValidationError) as error:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            raise OlpackError(
                f"{name} is gated: its owner must grant access.",
                f"Accept its terms on https://huggingface.co/datasets/{asked.id}, then run `hf auth login`.",
            ) from None
        raise OlpackError(
            f"{name} is not on the Hugging Face Hub, or it is private.",
            "Check its spelling; for a private one run `hf auth login`. A file here is named with `file`.",
        ) from None
    except (LocalEntryNotFoundError, ConnectionError, HTTPError) as error:
        if isinstance(error, HfHubHTTPError):  # an answer
            raise _not_fetched(name, error) from None
        raise OlpackError(
            f"{name} is not in the local cache and the Hugging Face Hub cannot be reached.", "Connect once, or save it as a file and name that."
        ) from None
    except ValueError as error:  # a split or subset that is not there, with those that are
        reason = " ".join(str(error).split("\nExample")[0].split())
        raise OlpackError(f"{name} cannot be read: {reason}", "Name one of those that it has as `split` or `subset`.") from None
    except (DatasetsError, RuntimeError, OSError) as error:
        raise _not_fetched(name, error) from None


def _not_fetched(name: str, error: Exception) -> OlpackError:
    return OlpackError(f"{name} could not be fetched: {first_line(error)}", "Run the same command again to go on.")
