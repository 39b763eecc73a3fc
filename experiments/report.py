"""A record as text for the terminal."""

from typing import Any


def as_text(record: dict[str, Any]) -> str:
    """The summary of a run: what it compressed, or what it measured."""
    match record.get("task", "compress"):
        case "footprint":
            lines = _footprint(record)
        case "latency":
            lines = _latency(record)
        case "precision":
            lines = _precision(record)
        case _:
            return _compressed(record)
    notes = [f"note: {note}" for note in record["notes"]]
    return "\n".join([*lines, f"seconds: {record['seconds']['measure']:.1f}", *notes])


def _footprint(record: dict[str, Any]) -> list[str]:
    """Weights and activations, and what is in memory at the peak."""
    found = record["results"]["footprint"]
    measured = [
        f"{size:,} measured on {device}"
        for device, size in found["activation_peak_measured_bytes"].items()
        if size is not None
    ]
    held = [
        f"  {tensor['module'] or 'network'} {tensor['operation']} "
        f"{'x'.join(map(str, tensor['shape']))} {tensor['dtype']}: {tensor['nbytes']:,}"
        for tensor in found["peak"]["alive"]
    ]
    return [
        f"{record['config']['model']['name']}, {found['dtype']}, "
        + (
            f"{found['batch_size']} x {found['tokens']} tokens"
            if "tokens" in found
            else f"{found['batch_size']} x {found['image_size']} x {found['image_size']} pixels"
        ),
        f"{'':<14}{'bytes':>14}{'%':>8}",
        f"{'weights':<14}{found['weight_bytes']:>14,}{found['weights_percent']:>8.2f}",
        f"{'activations':<14}{found['activation_peak_bytes']:>14,}"
        f"{found['activations_percent']:>8.2f}",
        f"{'total':<14}{found['total_bytes']:>14,}",
        f"activations of eager PyTorch: {found['activation_eager_peak_bytes']:,}"
        + "".join(f", {text}" for text in measured),
        f"in memory at the peak, {found['peak']['operation']}:",
        *held,
    ]


def _latency(record: dict[str, Any]) -> list[str]:
    """A line per variant, for each device and batch size."""
    found, machine = record["results"]["latency"], record["machine"]
    lines = []
    for device in ("cpu", "cuda"):
        results = found.get(device, {})
        name = f"{machine['cpu']}, threads: {machine['threads']}"
        name = name if device == "cpu" else machine["gpu"]
        for size in [key for key in results if key.startswith("batch_")]:
            lines += [
                f"{record['config']['model']['name']} on {name}, {size.replace('_', ' ')}",
                f"{'':<22}{'ms':>10}{'ratio':>8}{'per s':>10}{'MB read':>9}{'difference':>12}",
                *(
                    f"{variant:<22}{line['ms']:>10.2f}{line['time_ratio']:>8.2f}"
                    f"{line['per_second']:>10.1f}{(line.get('read_bytes') or 0) / 1e6:>9.1f}"
                    f"{_number(results['outputs'][variant]):>12}"
                    for variant, line in results[size].items()
                ),
                "",
            ]
        lines += [
            f"{variant}: at best {line['per_second']:.1f} per second, batch {line['batch_size']}"
            for variant, line in results.get("best_batch", {}).items()
        ]
    size = found["packed_file"]
    return [*lines, f"packed file: {size['file_bytes']:,} bytes of {size['reference_total']:,}"]


def _precision(record: dict[str, Any]) -> list[str]:
    """A line per dtype."""
    found = record["results"]["precision"]
    return [
        f"{record['config']['model']['name']}, {found['float32']['samples']} images",
        f"{'':<10}{'top-1 %':>10}{'top-5 %':>10}{'agree %':>10}{'KL':>12}",
        *(
            f"{dtype:<10}{line['top1']:>10.2f}{line['top5']:>10.2f}"
            f"{line.get('agreement', 100):>10.2f}{_number(line.get('kl', 0.0)):>12}"
            for dtype, line in found.items()
        ),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _compressed(record: dict[str, Any]) -> str:
    """Accuracy, bytes, time and one line per layer."""
    original, packed, size = record["original"], record["packed"], record["footprint"]
    config = record["config"]
    metrics = [heading for heading in _METRICS if _value(packed, heading)]
    lines = [
        f"{'layer':<44}{'shape':>20}{'bits':>5}{'groups':>8}{'error':>8}{'bytes':>11}",
        *map(_layer, record["layers"]),
        "",
        f"{'':<14}{''.join(f'{heading:>12}' for heading in metrics)}{'bytes':>14}",
        f"{'original fp16':<14}{_values(original, metrics)}{size['reference_total']:>14,}",
        f"{'packed':<14}{_values(packed, metrics)}{size['file_bytes']:>14,}",
        "",
        f"{config['model']['name']} on {config['data']['kind']}, {_samples(original, packed)}, "
        + _method(config),
        *_learning(record.get("learning", [])),
        f"alpha: goal {config['alpha']:g}, compressed layers {size['alpha_layers']:.3f}, "
        f"whole file {size['alpha_total']:.3f}",
        f"seconds: {', '.join(f'{k} {v:.1f}' for k, v in record['seconds'].items())}; "
        f"peak memory {record['peak_rss_bytes'] / 1e6:,.0f} MB",
        f"packed file: {record['file']}",
        *(f"note: {note}" for note in record["notes"]),
    ]
    return "\n".join(lines)


#: Metrics by heading: keys in a network's results, joined by dots, and digits after the point.
_METRICS = {
    "top-1 %": ("top1", 2),
    "top-5 %": ("top5", 2),
    "accuracy %": ("questions.average.acc", 2),
    "perplexity": ("perplexity", 3),
    "CLIP score": ("clip_score", 2),
    "shuffled": ("clip_score_shuffled", 2),
    "digits %": ("digit_accuracy", 2),
    "PSNR dB": ("psnr", 2),
    "perceptual": ("perceptual", 4),
    "agree %": ("agreement", 2),
    "KL": ("kl", 4),
}


def _value(results: dict[str, Any], heading: str) -> str:
    path, digits = _METRICS[heading]
    value: Any = results
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return "" if value is None else f"{value:.{digits}f}"


def _values(results: dict[str, Any], metrics: list[str]) -> str:
    return "".join(f"{_value(results, heading):>12}" for heading in metrics)


def _samples(original: dict[str, Any], packed: dict[str, Any]) -> str:
    """What was evaluated: images, prompts and their pictures, or questions and tokens."""
    if "prompts" in packed:
        return f"{packed['samples']} pictures of {packed['prompts']} prompts"
    if "tokens" not in packed:
        return f"{original['samples']} images"
    questions = f"{packed['samples']} questions, " if "samples" in packed else ""
    return f"{questions}{packed['tokens']} tokens"


def _method(config: dict[str, Any]) -> str:
    name = config["method"]["name"]
    if "init" not in config:
        return name
    return f"{name}, init {config['init']['method']}, {config['encoding']['kind']}"


def _learning(results: list[dict[str, Any]]) -> list[str]:
    """What learning changed: layers, blocks, and the divergence before and after distillation."""
    layers = [result for result in results if "kept" in result]
    blocks = [result for result in results if "best_epoch" in result and "after" in result]
    distilled = [result for result in results if "final_loss" in result]
    lines = []
    if layers:
        left = [result["name"] for result in layers if result["kept"] == "initialisation"]
        text = f"learned {len(layers) - len(left)} of {len(layers)} layers"
        lines.append(text + (f"; left as they were: {', '.join(left)}" if left else ""))
    if blocks:
        better = sum(result["best_epoch"] > 0 for result in blocks)
        lines.append(f"improved {better} of {len(blocks)} blocks")
    lines += [
        f"distillation: held-out divergence {result['initial_loss']:.4g} -> "
        f"{result['final_loss']:.4g}, epoch {result['best_epoch']} of {len(result['history'])}"
        for result in distilled
    ]
    return lines


def _layer(layer: dict[str, Any]) -> str:
    shape = "x".join(map(str, layer["shape"]))
    groups = max(layer["codebooks"], layer["scales"])
    error = layer["relative_error"]
    return (
        f"{layer['name'][-43:]:<44}{shape:>20}{layer['bits']:>5}{groups:>8}"
        f"{'' if error is None else format(error, '.4f'):>8}{layer['nbytes']:>11,}"
    )
