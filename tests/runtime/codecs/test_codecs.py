"""The codecs against every recorded codec tensor, and tiled decoding against a slow blending written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from codec_parts import decoder_sizes, write_codecs
from diffusers import AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import vocoder
from memory_meter import peak_of
from safetensors.torch import save_file
from support import distance, load, relative_l2
from test_tiling import recorded_tiling
from torch import Tensor

from ltxpack.errors import OverlayError, UsageError
from ltxpack.ltx23.expected import published_configs
from ltxpack.runtime.codecs import audio, video
from ltxpack.runtime.codecs.audio import decode_mel
from ltxpack.runtime.codecs.tiles import Cut, Tiling, auto_tiling, tiling_within
from ltxpack.runtime.codecs.video import LatentStatistics
from ltxpack.runtime.torch_settings import exact_float32

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# GOLDEN.md: how far the official code itself moves with other threads or kernels (5e-6 in fp32).
BOUNDS = {"fp32": 1e-5, "bf16": 1.4e-2}

VAE = {name: value for name, value in published_configs()["vae"].items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codecs(tmp_path_factory.mktemp("codecs"), golden)


@pytest.fixture(scope="module", params=DTYPES)
def parts(request: pytest.FixtureRequest, golden: Path, folder: Path) -> Iterator[SimpleNamespace]:
    """The loaded codecs, the recorded tensors and the bound, for one dtype."""
    name, dtype = request.param, DTYPES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            quick_bfloat16(patch)
        vae = video.load_video_vae(folder / "vae", CPU, dtype)
        recorded = load(golden / "golden" / f"components_{name}.safetensors")
        yield SimpleNamespace(
            name=name,
            bound=BOUNDS[name],
            vae=vae,
            audio_vae=audio.load_audio_vae(folder / "audio_vae", CPU, dtype),
            vocoder=audio.load_vocoder(folder / "vocoder", CPU, dtype),
            upsampler=video.load_upsampler(folder / "latent_upsampler", CPU, dtype),
            recorded=recorded,
            encoded=video.encode_image(vae, recorded["vae_enc.image_in"]),
        )


def quick_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Convolutions sum in float32 and round once: without bf16 units torch's own take a minute."""

    def rounded_once(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(module: torch.nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if x.is_meta:
                return real(module, x, weight, bias)
            return real(module, x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

        return forward

    for kind in (torch.nn.Conv2d, torch.nn.Conv3d):
        patch.setattr(kind, "_conv_forward", rounded_once(kind._conv_forward))


def compare(found: Tensor, expected: Tensor, bound: float) -> None:
    assert found.dtype == expected.dtype
    assert relative_l2(found, expected) <= bound


def test_every_encoded_latent(parts: SimpleNamespace) -> None:
    compare(parts.encoded, parts.recorded["vae_enc.image_latent"], parts.bound)
    found = video.encode_image(parts.vae, parts.recorded["vae_enc.video9_in"])
    compare(found, parts.recorded["vae_enc.video9_latent"], parts.bound)


def test_decoded_video(parts: SimpleNamespace) -> None:
    frames = torch.cat(list(video.decode_video(parts.vae, parts.recorded["vae_dec.latent"])))
    plain = parts.recorded["vae_dec.out_default_memory_efficient"][0].permute(1, 2, 3, 0)
    compare(frames, ((plain + 1) * 0.5).clamp(0, 1), parts.bound)
    assert plain.abs().max() > 1, "the clamp is not exercised"


def test_tiled_decode(parts: SimpleNamespace, golden: Path) -> None:
    """In bf16 bit for bit where the processor rounds as the one that recorded: the encoder tells."""
    exact = parts.name == "bf16" and torch.equal(parts.encoded, parts.recorded["vae_enc.image_latent"])
    chunks = list(video.decode_video(parts.vae, parts.recorded["vae_dec_tiled.latent"], recorded_tiling(golden)))
    assert [len(chunk) for chunk in chunks] == parts.recorded["vae_dec_tiled.chunk_frames"].tolist()
    frames = torch.cat(chunks)[parts.recorded["vae_dec_tiled.frames_sel_idx"]]
    compare(frames, parts.recorded["vae_dec_tiled.frames_sel"], 0.0 if exact else parts.bound)


@torch.no_grad()
def test_every_step_of_the_vocoder(parts: SimpleNamespace) -> None:
    """In float32 whatever the rest computes in; the resampler's filter is in no file and made on no meta device."""
    vocoder, recorded = parts.vocoder, parts.recorded
    wave = vocoder.vocoder(recorded["vocoder.in_mel"].float())
    compare(wave, recorded["vocoder.stage1_wave_16k"], parts.bound)
    compare(vocoder.resampler(wave), recorded["vocoder.skip_resampled"], parts.bound)
    mel = vocoder.mel_stft(wave.flatten(0, 1))[0].unflatten(0, (1, 2))
    compare(mel, recorded["vocoder.bwe_input_mel"], parts.bound)
    compare(vocoder.bwe_generator(mel.transpose(2, 3)), recorded["vocoder.bwe_residual"], parts.bound)


def test_mel_spectrogram_and_waveform_rounded_to_the_dtype_of_the_latents(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    mels: list[Tensor] = []
    monkeypatch.setattr(audio, "decode_mel", lambda *given: mels.append(decode_mel(*given)) or mels[0])
    latents = parts.recorded["audio_dec.latent"]
    wave = audio.decode_audio(parts.audio_vae, parts.vocoder, latents)
    compare(mels[0], parts.recorded["audio_dec.mel"], parts.bound)
    assert mels[0].shape[2] == 4 * latents.shape[2] - 3
    expected = parts.recorded["vocoder.out_wave_48k"]
    assert expected.dtype == DTYPES[parts.name]
    compare(wave, expected[0].float(), parts.bound)
    assert torch.equal(wave, wave.to(expected.dtype).float())
    assert audio.sample_rate(parts.vocoder) == 48000


@torch.no_grad()
def test_loud_sound_is_clamped_before_the_bandwidth_extension(parts: SimpleNamespace) -> None:
    vocoder, recorded = parts.vocoder, parts.recorded
    mel = recorded["vocoder_loud.in_mel"]
    wave = vocoder.vocoder(mel)
    compare(wave, recorded["vocoder_loud.stage1_wave_16k"], parts.bound)
    assert recorded["vocoder_loud.stage1_clipped_fraction"] > 0
    assert abs((wave.abs() == 1).float().mean() - recorded["vocoder_loud.stage1_clipped_fraction"]) < 1e-4
    compare(vocoder(mel), recorded["vocoder_loud.out_wave_48k"], parts.bound)

    vocoder.vocoder.final_act_fn = None
    try:
        assert distance(vocoder(mel), recorded["vocoder_loud.out_wave_48k"]) > 1e-2
    finally:
        vocoder.vocoder.final_act_fn = "clamp"


def test_filters_are_empty_only_while_a_vocoder_is_built_on_the_meta_device() -> None:
    """Each is in a file or made anew, and diffusers computes 400 of them."""
    plain = vocoder.kaiser_sinc_filter1d
    with audio._filters_by_shape():
        made = vocoder.UpSample1d(2).filter
        with torch.device("meta"):
            assert (empty := vocoder.UpSample1d(2).filter).is_meta and empty.shape == made.shape
    assert torch.equal(vocoder.UpSample1d(2).filter, made)
    assert vocoder.kaiser_sinc_filter1d is plain


def test_upsampled_latents(parts: SimpleNamespace) -> None:
    found = video.upsample(parts.upsampler, LatentStatistics.of(parts.vae), parts.recorded["upsampler.in"])
    compare(found, parts.recorded["upsampler.out"], parts.bound)


def test_a_single_latent_is_refused_where_a_channel_is_normalised_by_itself(parts: SimpleNamespace) -> None:
    """diffusers' module as it is raises a bare ValueError then; one more column is enough."""
    statistics, latents = LatentStatistics.of(parts.vae), parts.recorded["upsampler.in"]
    with pytest.raises(UsageError, match="too small a video for the upsampler") as caught:
        video.upsample(parts.upsampler, statistics, latents[:, :, :1, :1, :1])
    assert "--num-frames" in caught.value.next
    assert video.upsample(parts.upsampler, statistics, latents[:, :, :1, :1, :2]).shape[2:] == (1, 2, 4)


def precisions() -> dict[str, object]:
    """Every setting of torch that says how float32 numbers are multiplied."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "convolutions": cudnn.conv.fp32_precision,
        "products": matmul.fp32_precision,
        "recurrent": cudnn.rnn.fp32_precision,
        "cuda": cudnn.fp32_precision,
        "all": torch.backends.fp32_precision,
        "allow_tf32": (cudnn.allow_tf32, matmul.allow_tf32),
        "named": torch.get_float32_matmul_precision(),
        "others": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
    }


@pytest.fixture
def tf32_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """As a program may have set it for its own models."""
    before, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    yield precisions()
    torch.backends.cudnn.benchmark = benchmark
    torch.set_float32_matmul_precision(before)


def test_float32_is_float32_in_every_codec(parts: SimpleNamespace, tf32_allowed: dict[str, object]) -> None:
    """Inside the networks TF32 is off for convolutions and products; outside, all is as it was found."""
    recorded, seen = parts.recorded, {}

    def look(name: str) -> Callable[..., None]:
        return lambda module, args: seen.setdefault(name, []).append(precisions())

    networks = {"encoder": parts.vae.encoder, "decoder": parts.vae.decoder, "audio": parts.audio_vae.decoder}
    networks |= {"vocoder": parts.vocoder.vocoder, "upsampler": parts.upsampler}
    hooks = [network.register_forward_pre_hook(look(name)) for name, network in networks.items()]
    try:
        video.encode_image(parts.vae, recorded["vae_enc.image_in"][..., :64, :64])
        for _ in video.decode_video(parts.vae, recorded["vae_dec.latent"][..., :2, :2]):
            assert precisions() == tf32_allowed, "what the caller does between two groups is not ours"
        video.upsample(parts.upsampler, LatentStatistics.of(parts.vae), recorded["upsampler.in"])
        audio.decode_audio(parts.audio_vae, parts.vocoder, recorded["audio_dec.latent"][:, :, :2])
    finally:
        for hook in hooks:
            hook.remove()
    assert precisions() == tf32_allowed
    assert seen.keys() == networks.keys()
    for name, found in seen.items():
        for each in found:
            assert (each["convolutions"], each["products"], each["recurrent"]) == ("ieee",) * 3, name
            assert each["allow_tf32"] == (False, False), name
            assert all(each[kept] == tf32_allowed[kept] for kept in ("cuda", "all", "others")), name


def test_exact_float32_ends_with_its_last_user(tf32_allowed: dict[str, object]) -> None:
    """Two threads decode at once: neither gives TF32 back while the other computes."""
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert precisions()["convolutions"] == "ieee"
    second.__exit__(None, None, None)
    assert precisions() == tf32_allowed
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # the newer interface alone: the older cannot be read then
    try:
        with exact_float32():
            assert precisions()["allow_tf32"] == (False, False)
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_what_the_runs_decoded(parts: SimpleNamespace, golden: Path) -> None:
    runs = sorted((golden / "golden").glob(f"run_*_{parts.name}.safetensors"))
    assert runs
    for path in runs:
        run = load(path)
        if "upsampler.in" in run:
            found = video.upsample(parts.upsampler, LatentStatistics.of(parts.vae), run["upsampler.in"])
            compare(found, run["upsampler.out"], parts.bound)
        if "audio_waveform" in run:
            wave = audio.decode_audio(parts.audio_vae, parts.vocoder, run["stage1.audio_final_latent"])
            compare(wave, run["audio_waveform"], parts.bound)
            assert audio.sample_rate(parts.vocoder) == run["audio_sampling_rate"]
        frames = torch.cat(list(video.decode_video(parts.vae, run["stage2.video_final_latent"])))
        check_frames(frames, run, parts.bound)


def check_frames(frames: Tensor, run: dict[str, Tensor], bound: float) -> None:
    chosen = frames[run["decoded_frames_sel_idx"]] if "decoded_frames_sel_idx" in run else frames
    if "decoded_frames_sel_fhwc_0_1" in run:
        compare(chosen, run["decoded_frames_sel_fhwc_0_1"], bound)
    for key, part in (("decoded_frames_fhwc_u8_round", frames), ("decoded_frames_sel_fhwc_u8_round", chosen)):
        if key in run:
            eight_bit = (part.float() * 255).round()
            difference = (eight_bit - run[key].float()).abs()
            # fp32: within one step. bf16: rounding of another kernel may move a pixel further.
            assert difference.max() <= 1 if bound < 1e-3 else relative_l2(eight_bit, run[key].float()) <= bound
    recorded = run["decoded_frames_mean_std_min_max"]
    statistics = torch.stack([frames.float().mean(), frames.float().std(), *frames.float().aminmax()])
    assert torch.allclose(statistics, recorded.float(), rtol=0, atol=max(bound, 1e-6) * 2)


def test_a_component_of_another_class_is_refused(folder: Path) -> None:
    with pytest.raises(OverlayError, match="another class of component"):
        audio.load_vocoder(folder / "vae", CPU, torch.float32)


def small_vae() -> AutoencoderKLLTX2Video:
    """The real architecture at its smallest, random weights and statistics, no golden needed."""
    torch.manual_seed(3)
    vae = AutoencoderKLLTX2Video(
        **VAE
        | {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 16, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        }
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    return vae.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def small() -> AutoencoderKLLTX2Video:
    return small_vae()


def edge(position: float, first: int, last: int) -> float:
    """Weight ``i / (n + 1)`` at ``position`` counted from 0, in an edge of ``n = last - first`` positions."""
    return min(1.0, max(0.0, (position - first + 1) / (last - first + 1)))


def slow_decode(decode: Callable[[Tensor], Tensor], latents: Tensor, tiling: Tiling) -> Tensor:
    """All tiles into one float64 volume, each axis' weights position by position: spec 06, section 5, in words."""
    _, _, length, height, width = latents.shape

    def tiles(size: int, cut: Cut, scale: int, early: int) -> Iterator[tuple[slice, slice, Tensor]]:
        stride, start = cut.length - cut.overlap, 0
        while True:
            stop = min(start + cut.length, size)
            begin = start - early if start else 0
            left = begin * scale
            right = (stop - 1) * scale + 1 if early else stop * scale
            values = []
            for place in range(left, right):
                weight = 1.0
                if start:
                    lead = left + 1 if early else left
                    weight *= edge(place, lead, lead + cut.overlap * scale) if place >= lead else 0.0
                if stop < size:
                    weight *= edge(right - 1 - place, 0, cut.overlap * scale)
                values.append(weight)
            yield slice(begin, stop), slice(left, right), torch.tensor(values, dtype=torch.float64)
            if stop == size:
                return
            start += stride

    total = torch.zeros((length - 1) * 8 + 1, height * 32, width * 32, 3, dtype=torch.float64)
    for t, t_out, t_weight in tiles(length, tiling.frames, 8, 1):
        for h, h_out, h_weight in tiles(height, tiling.height, 32, 0):
            for w, w_out, w_weight in tiles(width, tiling.width, 32, 0):
                tile = decode(latents[:, :, t, h, w])[0].permute(1, 2, 3, 0).double()
                total[t_out, h_out, w_out] += torch.einsum("thwc,t,h,w->thwc", tile, t_weight, h_weight, w_weight)
    return ((total + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize(
    ("size", "tiling"),
    [
        ((7, 5, 4), Tiling(Cut(3, 1), Cut(3, 1), Cut(3, 1))),  # three groups, short last tiles
        ((6, 3, 5), Tiling(Cut(4, 1), Cut(3, 1), Cut(4, 2))),
        ((12, 3, 2), Tiling(Cut(10, 3), Cut(24, 2), Cut(24, 2))),  # the official cut in time
        ((2, 3, 3), Tiling(Cut(10, 3), Cut(24, 2), Cut(24, 2))),  # one tile
    ],
)
def test_tiled_decode_equals_a_slow_blending(
    small: AutoencoderKLLTX2Video, size: tuple[int, int, int], tiling: Tiling
) -> None:
    latents = torch.randn(1, 8, *size, generator=torch.Generator().manual_seed(1))

    def decode(tile: Tensor) -> Tensor:
        shape = (1, -1, 1, 1, 1)
        return small.decode(tile * small.latents_std.view(shape) + small.latents_mean.view(shape)).sample

    frames = torch.cat(list(video.decode_video(small, latents, tiling)))
    expected = slow_decode(decode, latents, tiling)
    assert (expected > 0).float().mean() > 0.1
    assert relative_l2(frames, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_changes_nothing_beyond_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 8, 3, 3, 2, generator=generator).to(dtype)
    pixels = torch.randn(1, 3, 9, 64, 96, generator=generator).clamp(-1, 1).to(dtype)
    vae = small_vae().to(dtype)
    frames, encoded = torch.cat(list(video.decode_video(vae, latents))), video.encode_image(vae, pixels)
    assert video.channels_last(vae) is vae
    limit = 1e-6 if dtype == torch.float32 else 1.4e-2
    assert relative_l2(torch.cat(list(video.decode_video(vae, latents))), frames) <= limit
    assert relative_l2(video.encode_image(vae, pixels), encoded) <= limit


def test_channels_last_reaches_the_convolutions() -> None:
    """No convolution of the decoder has to turn its input around."""
    vae = video.channels_last(small_vae())
    seen: dict[str, bool] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor]) -> None:
            seen[name] = args[0].is_contiguous(memory_format=torch.channels_last_3d)

        return hook

    for name, module in vae.decoder.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last_3d)
            module.register_forward_pre_hook(look(name))
    list(video.decode_video(vae, torch.randn(1, 8, 3, 3, 2)))
    assert len(seen) >= 10
    assert all(seen.values()), seen


@pytest.mark.parametrize("size", [(7, 4, 6), (10, 14, 24), (16, 34, 60)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_memory_of_a_tile_is_what_the_decoder_allocates(size: tuple[int, int, int], itemsize: int) -> None:
    """The real decoder on the meta device, which allocates nothing and forgets nothing."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Video(**VAE).to(dtype)
        latents = torch.empty(1, 128, *size, dtype=dtype)
    peak = peak_of(lambda: vae.decode(latents))
    count = math.prod(size)
    sizes = decoder_sizes(vae)
    assert sizes.largest_tile(peak, itemsize) <= count, "never less than what is allocated"
    assert sizes.largest_tile(int(1.3 * peak), itemsize) >= count, "nor much more"


def fast_tiling(vae: AutoencoderKLLTX2Video, latents: Tensor, available: int) -> Tiling:
    return tiling_within(tuple(latents.shape[2:]), decoder_sizes(vae), latents.itemsize, available)


def test_fast_tiling_uses_what_there_is() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Video(**VAE)
    latents = torch.empty(1, 128, 16, 34, 60, dtype=torch.bfloat16, device="meta")
    whole = Tiling(Cut(16, 3), Cut(34, 2), Cut(60, 2))
    assert fast_tiling(vae, latents, 80_000_000_000) == whole
    assert fast_tiling(vae, latents, 1_000_000_000) == auto_tiling(34, 60)
    between = fast_tiling(vae, latents, 16_000_000_000)
    assert between not in (whole, auto_tiling(34, 60))
    longer = torch.empty(1, 128, 40, 34, 60, dtype=torch.bfloat16, device="meta")
    assert fast_tiling(vae, longer, 10**12) != Tiling(Cut(40, 3), Cut(34, 2), Cut(60, 2)), "2**31 elements"


def test_fast_tiling_decodes_the_same_video(small: AutoencoderKLLTX2Video) -> None:
    """As one tile, without seams."""
    latents = torch.randn(1, 8, 11, 3, 2, generator=torch.Generator().manual_seed(2))
    official = torch.cat(list(video.decode_video(small, latents)))
    tiling = fast_tiling(small, latents, 10**12)
    assert tiling == Tiling(Cut(11, 3), Cut(24, 2), Cut(16, 2))
    (whole,) = video.decode_video(small, latents, tiling)
    untiled = small.decode(LatentStatistics.of(small).denormalise(latents)).sample[0].permute(1, 2, 3, 0)
    assert relative_l2(whole, ((untiled + 1) / 2).clamp(0, 1)) <= 1e-6
    assert whole.shape == official.shape
    assert not torch.equal(whole, official)


def test_frames_come_while_later_groups_wait(small: AutoencoderKLLTX2Video, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = small.decode

    def counted(latents: Tensor, **options: bool) -> object:
        decoded.append(latents.shape[2])
        return decode(latents, **options)

    monkeypatch.setattr(small, "decode", counted)
    chunks = video.decode_video(small, torch.randn(1, 8, 6, 4, 1), Tiling(Cut(3, 1), Cut(3, 1), Cut(3, 1)))
    assert len(next(chunks)) == 8
    assert decoded == [3, 3]
    assert [len(chunk) for chunk in chunks] == [16, 17]
    assert decoded == [3, 3, 4, 4, 3, 3]


def test_decoding_records_no_gradients(small: AutoencoderKLLTX2Video) -> None:
    (frames,) = video.decode_video(small, torch.randn(1, 8, 1, 1, 1, requires_grad=True))
    assert not frames.requires_grad
    assert torch.is_grad_enabled()


def test_statistics_there_and_back(small: AutoencoderKLLTX2Video) -> None:
    statistics = LatentStatistics.of(small)
    latents = torch.randn(1, 8, 2, 3, 4)
    assert torch.allclose(statistics.denormalise(statistics.normalise(latents)), latents, atol=1e-6)
    assert statistics.normalise(latents.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_read_without_the_rest(
    dtype: torch.dtype, small: AutoencoderKLLTX2Video, tmp_path: Path
) -> None:
    tensors = {**small.state_dict(), "latents_mean": torch.linspace(-1, 1, 8), "latents_std": torch.linspace(1, 2, 8)}
    file = tmp_path / "out" / "vae" / "m.safetensors"
    file.parent.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    found = LatentStatistics.read(file.parent, 8, CPU, dtype)
    assert torch.equal(found.mean, tensors["latents_mean"].to(dtype))
    assert torch.equal(found.std, tensors["latents_std"].to(dtype))
    with pytest.raises(OverlayError, match="latents_mean: the VAE's statistics are missing") as caught:
        LatentStatistics.read(file.parent, 128, CPU, dtype)
    assert (caught.value.expected, str(caught.value.found)) == ("floats [128]", "f32 [8]")
    del tensors["latents_std"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(OverlayError, match="latents_std") as caught:
        LatentStatistics.read(file.parent, 8, CPU, dtype)
    assert caught.value.found == "none"
