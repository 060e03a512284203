"""Every Redis key, with what it holds and how long it lives.

All keys of a partition share the hash tag `{namespace:partition}`, so that one script can touch
them in a cluster. Keys marked *live* expire seven days after they were last written, those of one
request seven days after they were begun: that only cleans up after a fleet that was abandoned.
The *cache lease* is a minute from the group's last heartbeat or update; where the group is declared
dead, leaves or registers again, the three keys go in the same call.

| key                       | type   | holds                                    | lives           |
| ------------------------- | ------ | ---------------------------------------- | --------------- |
| `request:<id>`            | hash   | a request's record, later its result     | live, then      |
|                           |        |                                          | `result_ttl`    |
| `journal:<id>`            | stream | its tokens so far: `chunk`; ends: `state`| live, then      |
|                           |        |                                          | `result_ttl`    |
| `intake:<priority>`       | stream | what is queued: `request_id`             | live            |
| `results:<name>`          | stream | what has ended: `request_id`, `state`    | `result_ttl`    |
| `bell:<producer>`         | stream | wakes a producer's blocked read          | 1 hour          |
| `durable`                 | string | written before waiting for the disk      | 1 minute        |
| `delayed`                 | zset   | ids that wait for another attempt, by    | live            |
|                           |        | when they are due                        |                 |
| `dead_letters`            | zset   | ids of dead letters, by when they died;  | live            |
|                           |        | 10,000 at most, the oldest go            |                 |
| `dead:<id>`               | hash   | a dead letter: what it takes to look     | live            |
|                           |        | into it and to submit it once more       |                 |
| `groups`                  | zset   | `group:epoch`, by when its lease ends;   | live            |
|                           |        | 0: dead, its requests are being moved    |                 |
| `group:<g>:<e>:status`    | string | the group's last heartbeat (GroupStatus) | live            |
| `group:<g>:<e>:inbox`     | stream | a batch: `batch_id`, and for each        | live            |
|                           |        | request `assignment:<fence>:<id>`;       |                 |
|                           |        | or `cancel`: a request's id              |                 |
| `group:<g>:<e>:owned`     | set    | ids of the requests that the group holds | live            |
| `group:<g>:<e>:held`      | string | how many it held when it died            | live            |
| `group:<g>:<e>:exclusive` | string | `running`: what the group holds is to be | live            |
|                           |        | alone; `wanted`: it is to become empty   | 3 s             |
| `group:<g>:<e>:cache`     | hash   | the directory's entry for what the group | cache lease     |
|                           |        | has cached: `number`, that of the last   |                 |
|                           |        | update that was carried out              |                 |
| `group:<g>:<e>:cache:device`| set  | hashes of the blocks in the device's     | cache lease     |
|                           |        | memory, 16 bytes each                    |                 |
| `group:<g>:<e>:cache:host`| set    | hashes of the blocks in host memory only | cache lease     |
| `epoch:<g>`               | string | the group's last epoch                   | live            |
| `model:<name>`            | string | ModelCard                                | live            |
| `salt`                    | string | secret behind the tenants' cache salts   | live            |
| `scheduler:<id>`          | string | a scheduler's heartbeat                  | 3 s             |

The record's fields: `state`, `request` (the message, until it ends), `priority`, `stream` (0|1),
`reply_to` (name of its results stream), `result_ttl_ms`, `fence`, `num_crashes` and `num_errors`
(of attempts), `num_neighbours` (what else its group held when it last died), `submitted_ms`,
`deadline_ms`, `num_journaled` (tokens in the journal), `entry` (its intake entry), `owner`
(`group:epoch`), `cancelled` (the result to store if its group ends before it does), `error` (the
result to store if it is not to be tried again), `result`, `finished_ms`.

A dead letter's fields: `reason`, `result`, `died_ms`, and of the record `request`,
`priority`, `stream`, `reply_to`, `result_ttl_ms`, `num_crashes`, `num_errors`, `num_journaled`,
`submitted_ms`, `deadline_ms`.
"""

from __future__ import annotations

import re

from wire.errors import ConfigError, InvalidRequest
from wire.ids import GroupId, RequestId
from wire.messages import PRIORITIES, Priority

DISPATCHERS = "schedulers"
"""The consumer group in which schedulers read the intake streams."""

CONSUMERS = "consumers"
"""The consumer group in which consumers share a results stream."""

LIVE_TTL_MS = 7 * 24 * 3600 * 1000
BELL_TTL_MS = 3600 * 1000
DURABLE_TTL_MS = 60 * 1000
SCHEDULER_TTL_MS = 3000

MAX_NAME_CHARS = 200
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class Keys:
    """The key names of one partition of one namespace."""

    def __init__(self, namespace: str, partition: int = 0) -> None:
        check_name("namespace", namespace)
        self.prefix = f"{{{namespace}:{partition}}}"
        self.groups = f"{self.prefix}:groups"
        self.delayed = f"{self.prefix}:delayed"
        self.dead_letters = f"{self.prefix}:dead_letters"
        self.salt = f"{self.prefix}:salt"
        self.durable = f"{self.prefix}:durable"
        self.intakes: dict[Priority, str] = {
            priority: f"{self.prefix}:intake:{priority}" for priority in PRIORITIES
        }

    def request(self, request_id: RequestId) -> str:
        """Hash: the request's record."""
        return f"{self.prefix}:request:{request_id}"

    def journal(self, request_id: RequestId) -> str:
        """Stream: the request's tokens, then its end."""
        return f"{self.prefix}:journal:{request_id}"

    def results(self, name: str) -> str:
        """Stream: which requests have ended."""
        return f"{self.prefix}:results:{name}"

    def dead_letter(self, request_id: RequestId) -> str:
        """Hash: a request that failed for good, kept to be looked into."""
        return f"{self.prefix}:dead:{request_id}"

    def bell(self, producer_id: str) -> str:
        """Stream: an entry here wakes the producer's blocked read."""
        return f"{self.prefix}:bell:{producer_id}"

    def status(self, group_id: GroupId, epoch: int) -> str:
        """String: the group's last heartbeat."""
        return f"{self.prefix}:group:{group_id}:{epoch}:status"

    def inbox(self, group_id: GroupId, epoch: int) -> str:
        """Stream: batches and cancellations for a group."""
        return f"{self.prefix}:group:{group_id}:{epoch}:inbox"

    def model(self, name: str) -> str:
        """String: the model's card."""
        return f"{self.prefix}:model:{name}"

    def scheduler(self, scheduler_id: str) -> str:
        """String: exists while the scheduler is alive."""
        return f"{self.prefix}:scheduler:{scheduler_id}"


def check_name(what: str, name: str) -> str:
    """Return `name` if it can be part of a key. Raises ConfigError otherwise."""
    if len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name[:60]!r} cannot be used: take 1 to {MAX_NAME_CHARS} of the characters "
            "A-Z a-z 0-9 _ . -"
        )
    return name


def check_request_id(request_id: str) -> RequestId:
    """Return the id if it can be part of a key. Raises InvalidRequest otherwise."""
    try:
        return RequestId(check_name("request_id", request_id))
    except ConfigError as error:
        raise InvalidRequest(str(error), field="request_id") from error
