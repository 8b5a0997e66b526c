"""A gateway without HTTP and without a loop: the model's text side, the dispatcher, the view of the cluster, the counters."""

import time
from collections.abc import Callable
from pathlib import Path

from ...messages.membership import Membership
from ...messages.post import Post
from ..router.load_view import LoadView
from ..router.policy import Policy
from ..router.registry import make_policy
from .config import GatewayConfig
from .decisions import DecisionLog
from .dispatch import Dispatcher
from .metrics import Metrics
from .status import GatewayStatus
from .tokenizer import TextModel


class Core:
    """Raises ModelError for a folder without a usable tokenizer, SpecError for an unknown policy."""

    def __init__(self, config: GatewayConfig, post: Post, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self.created = int(time.time())
        self.model = TextModel(Path(config.model_path))
        self.metrics = Metrics(config.gateway_id)
        self._post = post
        self._loads = LoadView(config.limits.silent_after_s)
        policy: Policy = make_policy(config.policy, config.policy_options)
        self.decisions = DecisionLog(config.explain)
        self.dispatcher = Dispatcher(post, policy, self._loads, config.limits, self.metrics, clock, self.decisions)
        self.max_model_len = self.model.max_position_embeddings           # until the workers say less
        self._add_gauges()

    def update_membership(self, membership: Membership) -> None:
        self.dispatcher.update_membership(membership)
        lengths = [member.max_model_len for member in self._loads.members]
        self.max_model_len = min(lengths, default=self.max_model_len)

    def pump(self) -> None:
        """Takes in all messages that are here."""
        self.dispatcher.handle(self._post.receive(0))

    def watch(self) -> None:
        """Messages first: a loop that was held up must not take its own silence for the workers'."""
        self.pump()
        self.dispatcher.watch()

    def why_not_ready(self) -> str | None:
        """None: a request would find a route now."""
        members = self._loads.members
        if not members:
            return "no workers are known yet"
        if not self._loads.view(self.clock()).decode:
            return f"none of {len(members)} known workers is alive and takes requests"
        return None

    def render_metrics(self) -> bytes:
        return self.metrics.render(self._loads.reports)

    def status(self, port: int) -> GatewayStatus:
        metrics = self.metrics
        return GatewayStatus(
            gateway_id=self.config.gateway_id,
            port=port,
            ready=self.why_not_ready() is None,
            num_running=self.dispatcher.num_running,
            num_queued=self.dispatcher.num_queued,
            num_workers_alive=self._num_alive(),
            outcomes=dict(metrics.outcomes),
            by_class=dict(metrics.by_class),
            good_by_class=dict(metrics.good_by_class),
            num_retries=metrics.num_retries,
            num_prompt_tokens=metrics.num_prompt_tokens,
            num_output_tokens=metrics.num_output_tokens,
            ttft=metrics.ttft,
            tpot=metrics.tpot,
            loads=self._loads.reports,
            transfers=metrics.transfers,
            last_span=metrics.last_span,
        )

    def _num_alive(self) -> int:
        now = self.clock()
        return sum(self._loads.lives(member.ref, now) for member in self._loads.members)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("choices_running", "Choices at workers", lambda: self.dispatcher.num_running)
        gauge("choices_queued", "Choices without a route", lambda: self.dispatcher.num_queued)
        gauge("workers_alive", "Workers heard of within silent_after_s", self._num_alive)
        gauge("dropped_frames", "Frames dropped: malformed, too large, or for a full queue", lambda: self._post.num_dropped)
