"""``kiridashi profile``: what device classes measured of themselves, by hand or asked for over MQTT."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from kiridashi.artifacts import write_atomic
from kiridashi.budget import MIB
from kiridashi.command import Command, Outcome
from kiridashi.errors import InputError
from kiridashi.probes import MAX_SECONDS, MAX_THREADS, decode_probe_report
from kiridashi.runtime import RUNTIMES

from kiridashi_server.cli.plant_state import add_state_argument, opened_server

if TYPE_CHECKING:
    from kiridashi_server.budget.profile import Profile as FittedProfile
    from kiridashi_server.fleet.records import Profile


def _add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="efficientnet-lite0", metavar="NAME", help="the backbone to cut")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="side of the input (default 64)")


def _configure_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the probe set")
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), default="onnxruntime", help="what is to run the cuts")
    parser.add_argument("--cuts", type=int, default=32, metavar="N", help="how many cuts (default 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random widths")
    _add_backbone_arguments(parser)


def _make(arguments: argparse.Namespace) -> Outcome:
    import torch  # takes seconds

    from kiridashi_server.backbone import Backbone
    from kiridashi_server.budget.probes import ProbeSettings, make_probe_set
    from kiridashi_server.narrator import Narrator

    torch.set_num_threads(1)
    backbone = Backbone.load(arguments.backbone, image_size=arguments.image_size)
    settings = ProbeSettings(runtime=arguments.runtime, cuts=arguments.cuts, seed=arguments.seed)
    with Narrator(("cuts",)).bar("cuts") as progress:
        probes = make_probe_set(backbone, arguments.output, settings, progress=progress)
    size = sum(graph.artifact.bytes for graph in probes.graphs)
    text = (
        f"the probe set '{probes.name}' ({probes.digest[:16]}): {len(probes.graphs)} graphs, {size / MIB:.1f} MiB\n"
        f"  next: copy it to the device; there: kiridashi-agent measure --profile {arguments.output} -o REPORT.json\n"
        f"  or over the air: kiridashi profile publish {arguments.output}"
    )
    return Outcome({"name": probes.name, "digest": probes.digest, "graphs": len(probes.graphs), "bytes": size}, text)


def _configure_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, metavar="REPORT", help="what the device measured")
    parser.add_argument("--probes", type=Path, required=True, metavar="DIR", help="the probe set that it measured")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="write the profile there")
    _add_backbone_arguments(parser)


def _fit(arguments: argparse.Namespace) -> Outcome:
    try:
        report = decode_probe_report(arguments.report.read_bytes(), str(arguments.report))
    except OSError as error:
        raise InputError(f"{arguments.report} cannot be read", why=str(error)) from error
    from kiridashi_server.backbone import Backbone
    from kiridashi_server.budget.probes import read_probe_set
    from kiridashi_server.budget.profile import fit_profile

    backbone = Backbone.load(arguments.backbone, image_size=arguments.image_size)
    probes = read_probe_set(arguments.probes)
    if (probes.height, probes.width) != backbone.input_size[1:]:
        raise InputError(
            f"the probe set '{probes.name}' is of images of {probes.height} x {probes.width} pixels",
            why=f"it was to be fitted for {arguments.image_size}",
            next_step=f"kiridashi profile fit ... --image-size {probes.height}",
        )
    profile = fit_profile(probes, report, backbone.quantities)
    write_atomic(arguments.output, msgspec.json.format(msgspec.json.encode(profile)) + b"\n")
    return Outcome(msgspec.to_builtins(profile), _fitted(profile, arguments.output))


def _fitted(profile: FittedProfile, path: Path) -> str:
    from kiridashi_server.budget.solver import LARGEST_MARGIN

    dense, missed = profile.dense, profile.error
    found = sorted(profile.cliffs.items())
    cliffs = [f"odd multiples of {size} take {ratio:.2f} times as long" for size, ratio in found]
    return "\n".join(
        (
            f"{profile.device_class}: {profile.runtime}, {profile.threads} thread(s), {profile.hardware} hardware, "
            f"{len(profile.points)} cuts",
            f"dense: p95 {dense.latency_p95_ms:.3g} ms, undisturbed {dense.quiet_ms:.3g} ms, "
            f"{dense.memory_bytes / MIB:.1f} MiB of memory",
            "; ".join([f"channel multiple {profile.multiple}", *cliffs]),
            f"nine of ten cuts left out of the fit were met within {missed['latency']:.1%} in latency, "
            f"{missed['memory']:.1%} in memory, {missed['file']:.1%} in file size",
            f"halves of a measurement differ by {profile.noise:.1%}; p95 is {profile.tail:.2f} of undisturbed time",
            *(
                f"more than the solver's largest margin of {LARGEST_MARGIN:.0%} in {name}: make a set of more --cuts"
                for name, error in missed.items()
                if error > LARGEST_MARGIN
            ),
            f"  next: kiridashi cut --profile {path} ...",
        )
    )


def _configure_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("probes", type=Path, metavar="DIR", help="folder with probes.json and its files")
    add_state_argument(parser)


def _publish(arguments: argparse.Namespace) -> Outcome:
    with opened_server(arguments) as server:
        entry = server.publish_probes(arguments.probes)
    text = (
        f"published the probe set '{entry.name}' ({entry.digest[:16]}): {entry.graphs} graphs, "
        f"{entry.bytes / 1024**2:.1f} MiB\n"
        f"  next: kiridashi profile request --line LINE --probes {entry.name}"
    )
    return Outcome(asdict(entry), text)


def _configure_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", action="append", default=[], metavar="NAME", help="who is to measure; repeatable")
    parser.add_argument("--line", metavar="NAME", help="all devices of this line")
    parser.add_argument("--probes", metavar="NAME", help="a published probe set's name or digest (default: the newest)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        metavar="S",
        help=f"measuring time, at most {MAX_SECONDS:g} (default 600)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help=f"inside one prediction, at most {MAX_THREADS} (default 1)"
    )
    add_state_argument(parser)


def _request(arguments: argparse.Namespace) -> Outcome:
    with opened_server(arguments) as server:
        asked = server.request_profile(
            arguments.device,
            line=arguments.line,
            probes=arguments.probes,
            seconds=arguments.seconds,
            threads=arguments.threads,
        )
    text = (
        f"{asked} device(s) are asked; each measures while its lines rest\n"
        "  next: kiridashi serve, if it does not run; then kiridashi profile list"
    )
    return Outcome({"devices_asked": asked}, text)


def _list(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.fleet.profiling import standing

    with opened_server(arguments) as server:
        sets = server.registry.profiles.probe_sets()
        requests = server.registry.profiles.requests()
        devices = {device.name: device for device in server.registry.devices()}
        profiles = server.profiles()
    names = {entry.digest: entry.name for entry in sets}
    states = [standing(request, devices[request.device]) for request in requests]
    asked = [asdict(request) | asdict(state) for request, state in zip(requests, states, strict=True)]
    text = [f"probe set '{entry.name}' ({entry.digest[:16]}): {entry.graphs} graphs, {entry.runtime}" for entry in sets]
    text += [
        f"{request.device} ({names.get(request.probes, 'a candidate of kiridashi cut')}): {state}"
        for request, state in zip(requests, states, strict=True)
    ]
    text += [_describe(profile) for profile in profiles]
    if profiles:
        text.append("next: kiridashi profile show CLASS -o REPORT.json")
    elif not sets:
        text.append("there are no probe sets yet; next: kiridashi profile publish DIR")
    elif not asked:
        text.append("no device is asked yet; next: kiridashi profile request --line LINE")
    data = {
        "probe_sets": [asdict(entry) for entry in sets],
        "requests": asked,
        "profiles": [_summary(profile) for profile in profiles],
    }
    return Outcome(data, "\n".join(text))


def _configure_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device_class", metavar="CLASS", help="a device class, as 'profile list' writes it")
    parser.add_argument("--runtime", choices=("onnxruntime", "litert"), help="only what this runtime was measured with")
    parser.add_argument("--threads", type=int, metavar="N", help="only what was measured with this many threads")
    parser.add_argument("--backbone", default="", metavar="FINGERPRINT", help="only of this backbone (or a beginning)")
    parser.add_argument("--probes", metavar="NAME", help="only of probe sets of this name")
    parser.add_argument("-o", "--output", type=Path, metavar="REPORT.json", help="write the report to this file")
    add_state_argument(parser)


def _show(arguments: argparse.Namespace) -> Outcome:
    with opened_server(arguments) as server:
        known = server.profiles()
    found = [profile for profile in known if _is_meant(profile, arguments)]
    if not found:
        raise InputError(
            f"there is no profile of the device class '{arguments.device_class}' that fits",
            why=f"known: {', '.join(sorted({profile.device_class for profile in known})) or 'none'}",
            next_step="kiridashi profile list; kiridashi profile request --device NAME",
        )
    if arguments.output is not None:
        if len(found) > 1:
            raise InputError(
                f"{len(found)} profiles fit, and one file was named",
                why="; ".join(map(_describe, found)),
                next_step="choose one with --probes, --runtime, --threads or --backbone",
            )
        write_atomic(arguments.output, msgspec.json.encode(found[0].report, order="sorted"))
    text = []
    for profile in found:
        text.append(_describe(profile))
        text += [
            f"  {timing.name}: quiet {timing.quiet_ms:.3g} ms, p95 {timing.p95_ms:.3g} ms, "
            f"{timing.memory_bytes / 1024**2:.1f} MiB"
            for timing in profile.report.timings
        ]
    reports = [_summary(profile) | {"report": msgspec.to_builtins(profile.report)} for profile in found]
    return Outcome({"profiles": reports}, "\n".join(text))


def _is_meant(profile: Profile, arguments: argparse.Namespace) -> bool:
    return (
        profile.device_class == arguments.device_class
        and arguments.runtime in (None, profile.runtime)
        and arguments.threads in (None, profile.threads)
        and arguments.probes in (None, profile.probe_set)
        and profile.backbone_fingerprint.startswith(arguments.backbone)
    )


def _summary(profile: Profile) -> dict[str, Any]:
    report = profile.report
    described = {key: value for key, value in asdict(profile).items() if key != "report"}
    return described | {"probes": report.probes, "complete": report.complete, "graphs": len(report.timings)}


def _describe(profile: Profile) -> str:
    report = profile.report
    return (
        f"{profile.device_class} ({profile.probe_set}): {report.runtime}, {profile.threads} thread(s), "
        f"{len(report.timings)} graphs{'' if report.complete else ' (incomplete)'}, "
        f"measured by {profile.device} at {profile.measured}"
    )


COMMANDS = (
    Command("profile make", "make a probe set: cuts of a backbone for a device to measure", _configure_make, _make),
    Command("profile fit", "fit a device's profile to its report", _configure_fit, _fit),
    Command("profile publish", "sign a probe set, so that devices can be asked for it", _configure_publish, _publish),
    Command("profile request", "ask devices to measure a probe set", _configure_request, _request),
    Command("profile list", "show probe sets, who was asked, and what came back", add_state_argument, _list),
    Command("profile show", "show what a device class measured", _configure_show, _show),
)
