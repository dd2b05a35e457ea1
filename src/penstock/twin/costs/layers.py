"""What one step's rows cost in everything but attention: matrix products, pointwise work, collectives.

A batch of N rows passes through the linear layers as one, whatever mix of chunks and decodes it is, so this
part of a step depends on N alone. All of it is pure.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from penstock.twin.costs.hardware import EngineProfile, HardwareProfile
from penstock.twin.costs.operators import CollectiveFit
from penstock.twin.costs.spec import ModelSpec, Parallel, experts_touched


@dataclass(slots=True)
class Share:
    """A part of a step on one device: seconds by what they are spent on, and the work itself."""

    compute_s: float = 0.0
    memory_s: float = 0.0
    overhead_s: float = 0.0
    link_s: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    arithmetic_s: float = 0.0  # of every operator, if its memory traffic were free
    traffic_s: float = 0.0  # and the other way round

    @property
    def seconds(self) -> float:
        return self.compute_s + self.memory_s + self.overhead_s + self.link_s

    def add(self, other: Share, times: int = 1) -> None:
        self.compute_s += other.compute_s * times
        self.memory_s += other.memory_s * times
        self.overhead_s += other.overhead_s * times
        self.link_s += other.link_s * times
        self.flops += other.flops * times
        self.bytes += other.bytes * times
        self.arithmetic_s += other.arithmetic_s * times
        self.traffic_s += other.traffic_s * times

    def divided(self, parts: int) -> Share:
        return Share(*(getattr(self, item.name) / parts for item in fields(Share)))


class RowCosts:
    """Costs of N rows on each device of a replica. Missing operators raise ConfigError at construction."""

    def __init__(
        self, spec: ModelSpec, hardware: HardwareProfile, engine: EngineProfile, parallel: Parallel
    ) -> None:
        parallel.check(spec)
        self._spec = spec
        self._parallel = parallel
        self._kernel_s = engine.kernel_s
        self._logit_bytes = 4 * engine.sample_passes
        self._gemm = hardware.gemm_of(spec.precision.compute)
        self._device = hardware.device(spec.precision.compute)
        self._pointwise = hardware.pointwise
        self._all_reduce = _link(hardware, engine, parallel.tensor)
        self._next_stage = _link(hardware, engine, 2 if parallel.pipeline > 1 else 1)
        self._value_bytes = spec.precision.activation_bits / 8

    def layers(self, rows: int) -> Share:
        """All layers, the embedding, and the way from stage to stage."""
        spec = self._spec
        total = self._pointwise_share(rows * spec.hidden * 2)
        total.add(self._attention_block(rows), spec.layers)
        total.add(self._dense_ffn(rows), spec.layers - spec.moe_layers)
        if spec.moe_layers:
            total.add(self._expert_ffn(rows), spec.moe_layers)
        if self._next_stage is not None:
            hop = Share(link_s=self._next_stage.seconds(rows * spec.hidden * self._value_bytes))
            total.add(hop, self._parallel.pipeline - 1)
        return total

    def qkv(self, rows: int) -> Share:
        """Of one layer: norm, q·k·v and rotary embedding."""
        spec, tensor = self._spec, self._parallel.tensor
        q_width = spec.q_width // tensor
        kv_width = self._parallel.kv_heads(spec) * spec.head_dim
        total = self._pointwise_share(rows * spec.hidden * 4)
        total.add(self._linear(rows, q_width + 2 * kv_width, spec.hidden))
        total.add(self._pointwise_share(rows * (q_width + kv_width) * 2))
        return total

    def projection(self, rows: int) -> Share:
        """Of one layer: attention's output projection."""
        return self._linear(rows, self._spec.hidden, self._spec.q_width // self._parallel.tensor)

    def ffn(self, rows: int) -> tuple[Share, Share]:
        """Of a mean layer, dense or of experts: the way up, and the way down without its all-reduce."""
        spec = self._spec
        if not spec.moe_layers:
            return self._dense_halves(rows)
        up, down = Share(), Share()
        kinds = (
            (self._dense_halves(rows), spec.layers - spec.moe_layers),
            (self._expert_halves(rows), spec.moe_layers),
        )
        for halves, layers in kinds:
            up.add(halves[0], layers)
            down.add(halves[1], layers)
        return up.divided(spec.layers), down.divided(spec.layers)

    def reduce_s(self, rows: int) -> float:
        """Seconds of one all-reduce of the rows' activations; 0 on one device."""
        if self._all_reduce is None:
            return 0.0
        return self._all_reduce.seconds(rows * self._spec.hidden * self._value_bytes)

    def head(self, samples: int) -> Share:
        """Final norm, output head, gathered logits and sampling, of the rows that are sampled from."""
        spec = self._spec
        vocab = -(-spec.vocab // self._parallel.tensor)
        total = self._pointwise_share(samples * spec.hidden * 4)
        weights_bytes = vocab * spec.hidden * spec.precision.head_bits / 8
        total.add(self._product(samples, vocab, spec.hidden, weights_bytes))
        total.add(self._pointwise_share(samples * spec.vocab * self._logit_bytes / self._value_bytes))
        if self._all_reduce is not None:
            # Gathering moves half of what reducing and spreading again moves.
            total.link_s += self._all_reduce.seconds(samples * spec.vocab * self._value_bytes / 2)
        return total

    def _attention_block(self, rows: int) -> Share:
        """Norm, q·k·v, rotary embedding and the output projection; attention itself is counted elsewhere."""
        total = self.qkv(rows)
        total.add(self.projection(rows))
        total.link_s += self.reduce_s(rows)
        return total

    def _dense_ffn(self, rows: int) -> Share:
        total, down = self._dense_halves(rows)
        total.add(down)
        total.link_s += self.reduce_s(rows)
        return total

    def _dense_halves(self, rows: int) -> tuple[Share, Share]:
        spec = self._spec
        width = -(-spec.ffn // self._parallel.tensor)
        up = self._pointwise_share(rows * spec.hidden * 4)
        up.add(self._linear(rows, 2 * width, spec.hidden))
        up.add(self._pointwise_share(rows * width * 3))
        return up, self._linear(rows, spec.hidden, width)

    def _expert_ffn(self, rows: int) -> Share:
        total, down = self._expert_halves(rows)
        total.add(down)
        total.link_s += self.reduce_s(rows)
        return total

    def _expert_halves(self, rows: int) -> tuple[Share, Share]:
        """Routed experts: weights of those touched are read once, rows are multiplied by the choices.

        Routing is taken as even, over experts and over the devices that hold them.
        """
        spec, parallel = self._spec, self._parallel
        touched = experts_touched(spec.experts, spec.experts_per_token, rows) / parallel.expert
        width = -(-spec.expert_ffn * parallel.expert // parallel.tensor)
        routed = max(1, -(-rows * spec.experts_per_token // parallel.expert))
        expert_bytes = width * spec.hidden * spec.precision.weight_bits / 8
        up = self._pointwise_share(rows * spec.hidden * 4)
        up.add(self._linear(rows, spec.experts, spec.hidden))
        up.add(self._product(routed, 2 * width, spec.hidden, touched * 2 * expert_bytes))
        up.add(self._pointwise_share(routed * width * 3))
        down = self._product(routed, spec.hidden, width, touched * expert_bytes)
        # Sorting rows by expert before, and adding the choices up after.
        down.add(self._pointwise_share(rows * spec.experts))
        down.add(self._pointwise_share(routed * spec.hidden))
        return up, down

    def _linear(self, rows: int, outputs: int, inputs: int) -> Share:
        return self._product(rows, outputs, inputs, outputs * inputs * self._spec.precision.weight_bits / 8)

    def _product(self, rows: int, outputs: int, inputs: int, weights_bytes: float) -> Share:
        shape = (self._device, rows, outputs, inputs, weights_bytes, self._value_bytes)
        compute, memory = self._gemm.sides(*shape)
        work_s = self._gemm.work_s(*shape)
        is_compute = compute >= memory
        return Share(
            compute_s=work_s if is_compute else 0.0,
            memory_s=0.0 if is_compute else work_s,
            overhead_s=self._gemm.launch_s + self._kernel_s,
            flops=2.0 * rows * outputs * inputs,
            bytes=weights_bytes + rows * (inputs + outputs) * self._value_bytes,
            arithmetic_s=compute,
            traffic_s=memory,
        )

    def _pointwise_share(self, values: float) -> Share:
        traffic_bytes = values * self._value_bytes
        launch_s = self._pointwise.launch_s
        memory_s = self._pointwise.seconds(self._device.bandwidth, traffic_bytes) - launch_s
        return Share(
            memory_s=memory_s,
            overhead_s=launch_s + self._kernel_s,
            bytes=traffic_bytes,
            traffic_s=memory_s,
        )


def _link(hardware: HardwareProfile, engine: EngineProfile, devices: int) -> CollectiveFit | None:
    return hardware.all_reduce(engine.all_reduce, devices) if devices > 1 else None
