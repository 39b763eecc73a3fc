"""A record as text for the terminal."""

from typing import Any


def as_text(record: dict[str, Any]) -> str:
    """The summary of a run: accuracy, bytes, time and one line per layer."""
    original, packed, size = record["original"], record["packed"], record["footprint"]
    config = record["config"]
    lines = [
        f"{'layer':<44}{'shape':>20}{'bits':>5}{'groups':>8}{'error':>8}{'bytes':>11}",
        *map(_layer, record["layers"]),
        "",
        f"{'':<14}{'top-1 %':>10}{'top-5 %':>10}{'agree %':>10}{'KL':>10}{'bytes':>14}",
        f"{'original fp16':<14}{original['top1']:>10.2f}{original['top5']:>10.2f}"
        f"{'':>20}{size['reference_total']:>14,}",
        f"{'packed':<14}{packed['top1']:>10.2f}{packed['top5']:>10.2f}"
        f"{packed['agreement']:>10.2f}{packed['kl']:>10.4f}{size['file_bytes']:>14,}",
        "",
        f"{config['model']['name']} on {config['data']['kind']}, {original['samples']} images, "
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
