"""The site's half of the protocol, without sockets, threads or a clock of its own.

Inputs are the server's messages, what this site wants to send, and the time; outputs are requests and events
(`fedcore.site.outputs`). Whoever drives a machine calls one of its methods, then carries out `take_outputs`, and
calls `tick` when `due` says so. Times are seconds of any clock that never goes back; the caller chooses it.

Invariants: a message that has no answer is sent again until it has one; at most one update is published, and at
most one download is under way; after an error nothing is sent that the driver did not ask for.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

from fedcore import __version__, protocol
from fedcore.encoding import EncodedUpdate, can_pack
from fedcore.errors import FedcoreError, LayoutError, ProtocolError, RefusedError

from . import outputs as out
from .settings import SiteSettings

__all__ = ["SiteMachine"]

_HELD_SECONDS: Final = 1.0
_BACK_OFF: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
_SETTLE_SECONDS: Final = 1.5
"""So long after it is connected again a site waits to be asked to join, before it repeats what may be lost."""


@dataclass
class _Held:
    """Another process has this site's name: one of this site's that has just died, or one that lives."""

    error: RefusedError
    since: float
    retry_seconds: float = _HELD_SECONDS


@dataclass
class _Pull:
    """A download that is under way, or of which wrong bytes came: then the task is given back at ``again``."""

    task: protocol.Task
    set_id: str
    again: float | None = None


class SiteMachine:
    """One site's part in a run, from the first `join` on. It belongs to one thread at a time.

    Args:
        settings: which site this is, which run it wants, and the server's address for messages of errors.
        instance: random id of this process.

    Attributes:
        welcome, accepted, task, finish: the last message of each kind; ``accepted`` is a layout's hash.
        wanted_run: name or id of the run that this site wants to take part in; None: of any.
        settings: which site this is, and how long it asks for its name.
        included: the last committed version that holds this site's update, as far as it is known.
        ready: the announcement of the published update; None if there is none.
        busy: why the server does not take this site up yet, in its words; empty once it has.
        error: why the machine has ended; None while it works.
    """

    def __init__(self, settings: SiteSettings, instance: uuid.UUID | None = None) -> None:
        self.settings = settings
        self.instance = instance or uuid.uuid4()
        self.wanted_run = settings.run
        self.welcome: protocol.Welcome | None = None
        self.accepted: str | None = None
        self.task: protocol.Task | None = None
        self.finish: protocol.Finish | None = None
        self.included: int | None = None
        self.ready: protocol.Ready | None = None
        self.busy = ""
        self.error: FedcoreError | None = None
        self._declare: protocol.Declare | None = None
        self._word: protocol.Score | protocol.Answer | None = None
        self._pull: _Pull | None = None
        self._pulled = ""
        self._spoiled = 0  # downloads in a row that came with wrong bytes
        self._held: _Held | None = None
        self._gave_up = ""  # why this site asks no more
        self._ended: tuple[str, int] | None = None
        self._warned: set[str] = set()
        self._sent_at: float | None = None
        self._outputs: list[out.Output] = []

    def take_outputs(self) -> list[out.Output]:
        """Return what has come up since the last call, in order."""
        taken, self._outputs = self._outputs, []
        return taken

    # --- what is known ---

    @property
    def rounds(self) -> int:
        """How many rounds the run has, once joined."""
        return self.welcome.rounds if self.welcome else 0

    @property
    def held(self) -> bool:
        """Whether another process has this site's name, and this one asks for it again."""
        return self._held is not None

    def held_too_long(self, now: float) -> RefusedError | None:
        """Give up, and return why, if this site's name was another process's for the connect timeout."""
        held = self._held
        if held is None or now - held.since <= self.settings.connect_timeout:
            return None
        self.give_up(held.error, "another process had its name for too long")
        return held.error

    def give_up(self, error: FedcoreError, reason: str) -> None:
        """Ask no more to take part: nobody would work for a site that joined later, and a run would wait for it.

        Args:
            error: what the script is given.
            reason: the server is given if it lets this site take part later.
        """
        self.error, self._held, self._gave_up = error, None, reason

    def ask_again(self, now: float) -> bool:
        """Ask to take part once more, if this site has given up; a further call of the script wants that."""
        if not self._gave_up:
            return False
        self.error, self._gave_up = None, ""
        self.join(now)
        return True

    def open_task(self) -> protocol.Task | None:
        """Return the current task, or None after its end."""
        task = self.task
        return None if task is None or (task.kind, task.round) == self._ended else task

    @property
    def has_done_all(self) -> bool:
        """Whether no task of the run is left for this site, as far as it is known."""
        task = self.task
        return (
            task is not None
            and self.open_task() is None
            and task.kind in ("train", "evaluate", "infer")
            and task.round >= task.rounds
        )

    # --- what this site sends ---

    def join(self, now: float) -> None:
        """Ask the server to take part."""
        self._sent_at = now
        self.send(
            protocol.Join(
                version=__version__,
                site=self.settings.site,
                instance=self.instance.hex,
                features=protocol.features(lossless=can_pack()),
                run=self.wanted_run,
            )
        )

    def send(self, message: protocol.FromSite) -> None:
        """Send a message once."""
        if isinstance(message, protocol.OfRun) and message.run_id is None and self.welcome:
            message = message.model_copy(update={"run_id": self.welcome.run_id})
        self._outputs.append(out.Send(message))

    def declare(self, declare: protocol.Declare) -> None:
        """Send this site's tensors, now and to every server that is started again."""
        self._declare = declare
        self.send(declare)

    def report(self, word: protocol.Score | protocol.Answer) -> None:
        """Send a score or an answer, now and whenever the server sends the task again."""
        self._word = word
        self.send(word)

    def publish(self, ready: protocol.Ready, update: EncodedUpdate | None) -> None:
        """Publish an update in place of the last one, and announce it until its fate is known.

        ``update`` is None where the driver makes the chunks by itself.
        """
        self.withdraw()
        self.ready = ready
        self._outputs.append(out.Publish(ready.model.id, update))
        self.send(ready)

    def withdraw(self) -> None:
        """Withdraw the published update, if there is one."""
        ready, self.ready = self.ready, None
        if ready is not None:
            self._outputs.append(out.Withdraw(ready.model.id))

    def end_task(self, kind: str, round_: int) -> None:
        """Note that this site has done a task."""
        self._ended = (kind, round_)

    def give_back(self, task: protocol.Task) -> None:
        """Forget a task whose model is not published any more; the server sends it again with another one."""
        if self.task is task:
            self.task = None

    def leave(self, reason: str) -> None:
        """Leave the run; nothing is sent where the server has refused this site."""
        if self.error is None or self._gave_up:  # a request to join may still be on its way
            self.send(protocol.Leave(reason=reason))

    # --- downloads ---

    def pull(self, task: protocol.Task) -> None:
        """Download the model of a task, in place of any other download."""
        self.stop_pull()
        assert task.model is not None
        self._pull, self._pulled = _Pull(task, task.model.id), ""
        self._outputs.append(out.Pull(task.model))

    def pulls(self, task: protocol.Task) -> bool:
        """Whether a task's model is downloaded at present, or is to be asked for again."""
        return self._pull is not None and self._pull.task is task

    def has_pulled(self, task: protocol.Task) -> bool:
        """Whether a task's model was what was downloaded last."""
        return task.model is not None and task.model.id == self._pulled

    def pulled(self, set_id: str, now: float, problem: str = "") -> None:
        """A download has ended: whole, or with a problem by its code in the protocol.

        After wrong bytes the task is given back a while later, longer each time in a row; after any other problem,
        such as a set that is not published any more, at once.
        """
        pull = self._pull
        if pull is None or pull.set_id != set_id or pull.again is not None:
            return
        if problem in ("checksum", "length"):
            seconds = _BACK_OFF[self._spoiled]
            self._spoiled = min(self._spoiled + 1, len(_BACK_OFF) - 1)
            pull.again = now + seconds
            self._outputs.append(out.Spoiled(seconds))
            return
        self._pull = None
        if problem:
            self.give_back(pull.task)
            return
        self._pulled, self._spoiled = set_id, 0
        self._outputs.append(out.Pulled(pull.task))

    def stop_pull(self) -> None:
        """End the download, if one is under way."""
        pull, self._pull = self._pull, None
        if pull is not None and pull.again is None:
            self._outputs.append(out.StopPull(pull.set_id))

    # --- time, and the connection ---

    def due(self) -> float | None:
        """Return when `tick` has something to do; None if never without another input."""
        if self._sent_at is None or self.finish is not None or self.error is not None:
            return None
        repeat = self._sent_at + self._interval()
        again = self._pull.again if self._pull is not None else None
        return repeat if again is None else min(repeat, again)

    def tick(self, now: float) -> None:
        """Send again what has had no answer for a while: a message can be lost when a link is cut.

        While the script works on its task nothing is due, and yet a server that was started again in between
        must learn that this site is there.
        """
        due = self.due()
        if due is None or now < due:
            return
        if self._pull is not None and self._pull.again is not None and now >= self._pull.again:
            pull, self._pull = self._pull, None
            self.give_back(pull.task)
        if self._sent_at is None or now < self._sent_at + self._interval():
            return
        self._sent_at = now
        joined = self._held is None and self.welcome is not None
        joined = joined and (self._declare is None or self.accepted is not None)
        if joined and self.ready is not None:
            self.send(self.ready)
        elif joined and self.open_task() is not None:
            self.send(protocol.Alive())
        else:
            self.join(now)

    def reconnected(self, now: float) -> None:
        """The link has a new connection: what was sent over the last one may be lost."""
        if self._sent_at is not None:
            self._sent_at = min(self._sent_at, now - self._interval() + _SETTLE_SECONDS)

    def _interval(self) -> float:
        return protocol.REPEAT_SECONDS if self._held is None else self._held.retry_seconds

    def fail(self, error: FedcoreError) -> None:
        """End the machine, as where the link will never be accepted; the first error counts."""
        if self.error is None:
            self.error = error
            self._outputs.append(out.Failed(error))

    def other_version(self, version: int) -> None:
        """The server has sent a frame of another version of the protocol."""
        if self.welcome is None:
            self.fail(
                RefusedError(
                    f"the server at {self.settings.server} speaks protocol {version}, this site "
                    f"{protocol.PROTOCOL_VERSION} (fedcore {__version__}); install the same version of fedcore on "
                    "both sides",
                    "version",
                )
            )

    # --- what the server sends ---

    def receive(self, body: bytes, now: float) -> None:
        """Take in a control message as it travels; one of another run, or no valid one, changes nothing."""
        try:
            message = protocol.decode_from_server(body)
        except ProtocolError as error:
            self._outputs.append(out.Malformed(str(error)))
            return
        if self.welcome is None or protocol.is_of_run(message, self.welcome.run_id):
            self.handle(message, now)

    def handle(self, message: protocol.FromServer, now: float) -> None:
        """Take in a control message of this run."""
        match message:
            case protocol.Rejoin():
                if self.error is None:  # a site that was refused does not come again by itself
                    self.join(now)
            case protocol.Welcome():
                self._on_welcome(message)
            case protocol.Accepted():
                self._on_accepted(message)
            case protocol.Refused():
                self._on_refused(message, now)
            case protocol.Task():
                self._on_task(message)
            case protocol.Commit():
                self._on_commit(message)
            case protocol.Dropped():
                self._outputs.append(out.Dropped(message.round, message.message))
                self._settle(range(message.round, message.round + 1), None)
            case protocol.Finish():
                self.finish = message
                self._outputs.append(out.Finished(message))
            case protocol.Stopped():
                # As after a crash, the server that is started next sends all that this site waits for.
                if self.finish is None:
                    self._outputs.append(out.Stopped(message.message))

    def _on_welcome(self, welcome: protocol.Welcome) -> None:
        server = self.settings.server
        if self._gave_up:
            reason = f"{self._gave_up}, and it asks no more"
            self.send(protocol.Leave(reason=reason, run_id=welcome.run_id))
            return
        if self.welcome is not None and self.welcome.run_id != welcome.run_id:
            same = welcome.run == self.welcome.run
            what = "under another id, as after a rollback" if same else "and not this site's"
            self.fail(
                RefusedError(
                    f"the server at {server} now serves run {welcome.run!r} {what}; start this site again to take "
                    "part in it",
                    "other-run",
                )
            )
            # The server has taken this site for one that takes part: it would wait for it, and show it as lost.
            reason = (
                "it took part in the run before this one, or under its earlier id: start it again"
            )
            self.send(protocol.Leave(reason=reason, run_id=welcome.run_id))
            return
        if self.wanted_run not in (None, welcome.run, welcome.run_id):
            self.fail(
                RefusedError(
                    f"the server at {server} serves run {welcome.run!r}, and not {self.wanted_run!r}",
                    "other-run",
                )
            )
            return
        first, self.welcome, self._held, self.busy = self.welcome is None, welcome, None, ""
        if first:
            self._outputs.append(out.Joined(welcome.run))
        if self._declare is not None:
            self.send(self._declare)
        elif self.ready is not None:  # one that an earlier process has trained
            self.send(self.ready)

    def _on_accepted(self, accepted: protocol.Accepted) -> None:
        self.accepted = accepted.layout_hash
        for text in accepted.warnings:
            if text not in self._warned:
                self._warned.add(text)
                self._outputs.append(out.Warned(text))
        if self.ready is not None:
            self.send(self.ready)

    def _on_refused(self, refused: protocol.Refused, now: float) -> None:
        if refused.code == "name-in-use":
            if not self._gave_up:
                self._on_name_in_use(refused, now)
            return
        if refused.code == "busy":  # it asks again, as without an answer
            if self.busy != refused.message and not self._gave_up:
                self.busy = refused.message
                self._outputs.append(out.Busy(refused.message))
            return
        refusal = RefusedError(refused.message, refused.code)
        self.error = LayoutError(refused.message) if refused.code == "layout" else refusal
        self._outputs.append(out.Failed(self.error))

    def _on_name_in_use(self, refused: protocol.Refused, now: float) -> None:
        """Go on asking: the server may not have noticed yet that this site's last process has died."""
        error = RefusedError(refused.message, refused.code)
        if self._held is not None:
            self._held.error = error
            self._held.retry_seconds = min(1.5 * self._held.retry_seconds, protocol.REPEAT_SECONDS)
            return
        self._held = _Held(error, now)
        self._outputs.append(out.HeldElsewhere())

    def _on_task(self, task: protocol.Task) -> None:
        self.task = task
        if self._pull is not None and self._pull.task.model != task.model:
            self.stop_pull()  # another model is published by now
        if self._word is not None and self.open_task() is None:
            self.send(self._word)  # it did not come through, or the server was started again
        if task.included is not None:
            self.included = task.included
        if task.kind not in ("initial", "submit"):
            self._settle(range(task.version + 1), task.included, late=True)
        self._outputs.append(out.Tasked(task))

    def _on_commit(self, commit: protocol.Commit) -> None:
        if commit.included:
            self.included = commit.version
        self._settle(range(commit.version + 1), commit.version if commit.included else None)
        self._outputs.append(out.Committed(commit, self.rounds))

    def _settle(self, rounds: range, included_in: int | None, *, late: bool = False) -> None:
        """Withdraw the update if it is of one of ``rounds``, and report whether it counts."""
        ready = self.ready
        if ready is None or ready.round not in rounds:
            return
        self.withdraw()
        self._outputs.append(out.Settled(ready, ready.round == included_in, late))
