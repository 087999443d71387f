"""What a site has trained: encoded, published, and kept on its own disk until it is settled whether it counts."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

from fedcore import protocol
from fedcore._core import Layout
from fedcore.encoding import EncodedUpdate
from fedcore.errors import ProtocolError
from fedcore.layout import layout_hash
from fedcore.model_file import ModelFile, Reader

from .connection import Connection
from .encoded import Outgoing
from .metrics import MetricCheck
from .settings import SiteSettings
from .work import WorkFolder

__all__ = ["Updates"]

logger = logging.getLogger("fedcore.client")


class Updates:
    """The updates of one site's process, in the work folder of its run.

    Args:
        settings: who this site is, and where work folders lie.
        connection: publishes them; it has joined before anything here is called, but for `close`.
        check: of the metrics that go with an update.
    """

    def __init__(self, settings: SiteSettings, connection: Connection, check: MetricCheck) -> None:
        self._settings = settings
        self._connection = connection
        self._machine = connection.machine
        self._check = check
        self._work: WorkFolder | None = None
        self._outgoing: Outgoing | None = None
        self._looked = False
        self._base = ""
        self._trains = False  # this process was asked to train

    def folder(self) -> WorkFolder:
        """Return the work folder, which is taken on the first call."""
        if self._work is None:
            assert self._machine.welcome is not None
            run_id = self._machine.welcome.run_id
            self._work = work = WorkFolder(self._settings.work, self._settings.site, run_id)

            def forget(ready: protocol.Ready, _included: bool) -> None:
                work.forget(ready.model.id)

            self._connection.settled = forget
        return self._work

    def prepare(self, layout: Layout, base: str) -> None:
        """Make room for the update of a task before anything is trained for it.

        Args:
            layout: of the update's tensors.
            base: the checksum of the model that it is trained from.

        Raises:
            StorageError: neither the work folder nor memory has room for it; what is needed is named.
        """
        self._base, self._trains = base, True
        self.folder().reserve(layout)
        self._made(layout).prepare(self._machine.included)

    def publish(
        self,
        layout: Layout,
        read: Reader,
        round_: int,
        *,
        weight: int = 1,
        metrics: Mapping[str, float] | None = None,
        score: protocol.Score | None = None,
        initial: bool = False,
        part: tuple[Layout, Reader] | None = None,
    ) -> None:
        """Publish this site's values in place of what it had published.

        Args:
            layout: of the tensors, each of which ``read`` gives the bytes of.
            read: called for one tensor after the other, before this returns.
            round_: whose update it is.
            weight, metrics: what `protocol.Ready` says of it.
            score: what this site said of the global model before; it is kept with the update.
            initial: they are no update but the run's first model, which has no bound.
            part: the layout of the global model, where the update holds a part of it, and what gives that part as
                it was before training.

        Raises:
            ProtocolError: a first model is asked for after training, and the norm of updates is bounded.
        """
        if initial and self._trains and self._settings.clip is not None:
            raise ProtocolError(
                "the server asks for an initial model after training; what was trained does not leave without the "
                "bound of FEDCORE_CLIP"
            )
        self._connection.withdraw()
        file = self.folder().update(layout)
        update = self._encode(layout, file, file.fill(read), None if initial else round_, part)
        ready = protocol.Ready(
            round=round_,
            sets=[protocol.NamedSet(id=uuid.uuid4().hex, layout=layout_hash(layout))],
            weight=weight,
            metrics=self._check(metrics or {}, "train_metrics"),
        )
        if not initial:
            of = "" if part is None else layout_hash(part[0])
            clip = self._settings.clip
            self.folder().record(ready, update, score, base=self._base, clip=clip, of=of)
        self._connection.publish(ready, update)

    def _encode(
        self,
        layout: Layout,
        file: ModelFile,
        checksums: list[int],
        round_: int | None,
        part: tuple[Layout, Reader] | None,
    ) -> EncodedUpdate:
        """Encode an update as the run wants it: the difference to the global model that this site trained from."""
        outgoing = self._made(layout)
        if round_ is None:
            return outgoing.initial(file, checksums)
        base = self.folder().received(layout if part is None else part[0])
        if part is not None and outgoing.encodes:
            base = self.folder().part(layout, part[1])
        return outgoing.encode(round_, file, checksums, base, self._machine.included)

    def _made(self, layout: Layout) -> Outgoing:
        """Return what encodes updates of a layout, made anew where it is another one."""
        if self._outgoing is None or self._outgoing.layout is not layout:
            assert self._machine.welcome is not None
            self._outgoing = Outgoing(
                layout,
                self._machine.welcome.transfer,
                self.folder(),
                self._settings.site,
                self._settings.clip,
            )
        return self._outgoing

    def deliver_kept(self, task: protocol.Task) -> bool:
        """Offer what an earlier process of this site has trained for this task; whether there was that.

        It is looked for once.
        """
        welcome = self._machine.welcome
        if self._looked or welcome is None:
            return False
        self._looked = True
        kept = self.folder().kept(task, welcome.chunk_bytes, self._settings.clip)
        if kept is None:
            return False
        ready, score = kept.record.ready, kept.record.score
        logger.info("%s: round %d was trained before this process was started; its update is "
                    "delivered again", self._settings.site, ready.round)  # fmt: skip
        if score is not None:
            self._connection.send(score)
        self._connection.publish(ready, kept.update)
        return True

    def close(self, *, keep: bool) -> None:
        """Let go of the work folder, and remove it unless what is in it is to be delivered later."""
        if self._work is not None:
            self._work.close(keep=keep)
