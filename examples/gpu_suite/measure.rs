//! What CUDA itself costs and gives: the host's time per operation, matrix products at one row, graphs, transfers.

#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DriverError};
use candle_core::{DType, Device, Tensor};
use worker_candle::checkpoint::Checkpoint;
use worker_candle::config::Quantization;
use worker_candle::kernels::candle::{Buffer, Candle, Matrix};
use worker_candle::kernels::cuda::{Cuda, Dtype, Gpu};
use worker_candle::kernels::{Backend, Batch, BatchRow, Epilogue, Linear, Norm, NormKind};
use worker_candle::models::decoder::{Decoder, LayerCache};
use worker_candle::models::device::open_device;
use worker_candle::models::families::Model;
use worker_candle::models::shard::Shard;
use worker_candle::models::tensors::Tensors;

use crate::kernels::Random;
use crate::report::Part;
use crate::{Fail, Options, model};

const MIB: usize = 1 << 20;

fn open(options: &Options) -> Result<(Device, CudaDevice), Fail> {
    let device = open_device(options.device)?;
    let Device::Cuda(cuda) = &device else { return Err("not a CUDA device".into()) };
    let cuda = cuda.clone();
    Ok((device, cuda))
}

/// Our own kernels on the device, in the type of activations.
fn ours(cuda: &CudaDevice, dtype: Dtype) -> Result<Cuda<Gpu>, Fail> {
    Ok(Cuda::new(Gpu::new(cuda)?, dtype))
}

/// What a start asks of the device, and how long that takes.
pub fn self_check(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let (_device, cuda) = open(options)?;
    for (name, dtype) in [("bf16", Dtype::Bf16), ("f32", Dtype::F32)] {
        let mut backend = ours(&cuda, dtype)?;
        for run in ["first", "second"] {
            let started = Instant::now();
            let found = backend.self_check();
            part.measure(format!("{name}, {run} time"), started.elapsed().as_secs_f64() * 1e3, "ms");
            found.iter().for_each(|found| part.check(format!("{name}: {}", found.kernels), false, found.said.clone()));
            part.check(format!("{name}: every kernel agrees, {run} time"), found.is_empty(), format!("{} disagreements", found.len()));
        }
    }
    Ok(())
}

/// Our own kernels against the CPU's, on the random shapes that candle's operations are compared on.
pub fn twins(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let (_device, cuda) = open(options)?;
    for (tensors, dtype) in [(DType::F32, Dtype::F32), (DType::BF16, Dtype::Bf16)] {
        let mut backend = ours(&cuda, dtype)?;
        crate::kernels::compare_all(part, tensors, &mut backend, |backend, cache| Ok(backend.stored(cache)?))?;
    }
    Ok(())
}

/// Name, compute capability, memory.
pub fn machine(part: &mut Part, device: &Device) -> Result<(), Fail> {
    let Device::Cuda(cuda) = device else { return Ok(()) };
    let context = cuda.cuda_stream().context().clone();
    let (major, minor) = context.compute_capability()?;
    let (free, total) = context.mem_get_info()?;
    part.note(format!("GPU: {}, compute capability {major}.{minor}", context.name()?));
    part.measure("memory", total as f64 / 1e9, "GB");
    part.measure("memory free", free as f64 / 1e9, "GB");
    part.check("events are not tracked", !cuda.is_event_tracking(), "one stream, one thread");
    Ok(())
}

/// Bytes read and written per second by a copy on the device: the bandwidth that can be reached.
fn peak(cuda: &CudaDevice) -> Result<f64, Fail> {
    let from = cuda.alloc_zeros::<u8>(1024 * MIB)?;
    let mut to = cuda.alloc_zeros::<u8>(1024 * MIB)?;
    let times = 20;
    cuda.memcpy_dtod(&from, &mut to)?;
    cuda.cuda_stream().synchronize()?;
    let started = Instant::now();
    for _ in 0..times {
        cuda.memcpy_dtod(&from, &mut to)?;
    }
    cuda.cuda_stream().synchronize()?;
    Ok(2.0 * (times * 1024 * MIB) as f64 / started.elapsed().as_secs_f64())
}

/// A product with the matrix, without a bias.
fn plain(matrix: &Tensor) -> Linear<Matrix, Tensor> {
    Linear { weight: Matrix::Tensor(matrix.clone()), bias: None }
}

/// What the host needs to hand one small operation to the device.
pub fn host_cost(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let (device, cuda) = open(options)?;
    let mut random = Random(3);
    let x = random.tensor(&[1, 1024])?.to_dtype(DType::BF16)?.to_device(&device)?;
    let w = random.tensor(&[1024])?.to_dtype(DType::BF16)?.to_device(&device)?;
    let m = random.tensor(&[64, 1024])?.to_dtype(DType::BF16)?.to_device(&device)?;
    let id = Tensor::from_slice(&[0u32], 1, &device)?;
    let input = Buffer::of(x.clone());
    let norm = Norm { kind: NormKind::Rms, weight: w, bias: None, eps: 1e-5 };
    let linear = plain(&m);
    let backend = || (Candle::new(&device), Buffer::default());
    let ((mut normalizing, mut normed), (mut multiplying, mut product)) = (backend(), backend());
    type Op<'a> = Box<dyn FnMut() -> candle_core::Result<()> + 'a>;
    let ops: [(&str, Op<'_>); 7] = [
        ("add", Box::new(|| x.add(&x).map(drop))),
        ("silu", Box::new(|| x.silu().map(drop))),
        ("rms_norm", Box::new(|| normalizing.norm(&input, &norm, &mut normed))),
        ("matmul 1 x 1024 x 64", Box::new(|| multiplying.linear(&input, &linear, Epilogue::Store, &mut product))),
        ("index_select (uploads its shape)", Box::new(|| m.index_select(&id, 0).map(drop))),
        ("contiguous of a transposed matrix (uploads its strides)", Box::new(|| m.t()?.contiguous().map(drop))),
        ("upload of one u32", Box::new(|| Tensor::from_slice(&[0u32], 1, &device).map(drop))),
    ];
    for (name, mut op) in ops {
        for _ in 0..200 {
            op()?;
        }
        cuda.cuda_stream().synchronize()?;
        let times = 5_000;
        let started = Instant::now();
        for _ in 0..times {
            op()?;
        }
        let handed = started.elapsed();
        cuda.cuda_stream().synchronize()?;
        part.measure(format!("{name}: handed over"), handed.as_secs_f64() * 1e6 / f64::from(times), "us");
        part.measure(format!("{name}: until done"), started.elapsed().as_secs_f64() * 1e6 / f64::from(times), "us");
    }
    part.check("every operation ran", true, "5,000 times each");
    Ok(())
}

/// Captures `work` as a graph. On an error the capture is ended, so that the stream can be used again.
fn capture(cuda: &CudaDevice, work: impl FnOnce() -> candle_core::Result<()>) -> Result<CudaGraph, Fail> {
    let stream = cuda.cuda_stream();
    // Small parameter uploads come from the cache that the warm-up filled; a miss is an error, not a silent wrong.
    let _cache = cuda.enable_cuda_graph_htod_cache();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let worked = work();
    let ended = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    worked?;
    let graph = ended?.ok_or("the capture gave no graph")?;
    graph.upload()?;
    Ok(graph)
}

/// Runs `work` with the upload cache on, as the capture after it will find it.
fn warm_up(cuda: &CudaDevice, work: impl FnOnce() -> candle_core::Result<()>) -> Result<(), Fail> {
    {
        let _cache = cuda.enable_cuda_graph_htod_cache();
        work()?;
    }
    Ok(cuda.cuda_stream().synchronize()?)
}

/// Seconds per replay, the device kept busy.
fn replays(cuda: &CudaDevice, graph: &CudaGraph, times: u32) -> Result<f64, Fail> {
    graph.launch()?;
    cuda.cuda_stream().synchronize()?;
    let started = Instant::now();
    (0..times).try_for_each(|_| graph.launch())?;
    cuda.cuda_stream().synchronize()?;
    Ok(started.elapsed().as_secs_f64() / f64::from(times))
}

/// cuBLAS at one row: the share of the bandwidth that a decode step's matrices reach.
pub fn matmul(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let (device, cuda) = open(options)?;
    let peak = peak(&cuda)?;
    part.measure("copy on the device, reads and writes", peak / 1e9, "GB/s");
    for (k, n) in [(1024, 2560), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 103_424)] {
        for rows in [1usize, 8] {
            let share = one_shape(&device, &cuda, rows, k, n)? / peak;
            part.measure(format!("{rows} x {k} x {n}: share of it"), share, "");
            part.check(format!("{rows} x {k} x {n}"), share > 0.0 && share < 1.5, format!("{:.0} GB/s of weights", share * peak / 1e9));
        }
    }
    Ok(())
}

/// Bytes of weights read per second. Weights take turns so that none is found in a cache; a graph keeps the host out of the way.
fn one_shape(device: &Device, cuda: &CudaDevice, rows: usize, k: usize, n: usize) -> Result<f64, Fail> {
    let bytes = k * n * 2;
    let copies = (512 * MIB / bytes).clamp(4, 128);
    let mut backend = Candle::new(device);
    let x = Buffer::of(Tensor::ones((rows, k), DType::BF16, device)?);
    let weight = || Ok(plain(&Tensor::zeros((n, k), DType::BF16, device)?));
    let weights = (0..copies).map(|_| weight()).collect::<candle_core::Result<Vec<_>>>()?;
    // Each result is dropped at once: what a graph allocates it also frees.
    let mut all = || weights.iter().try_for_each(|w| backend.linear(&x, w, Epilogue::Store, &mut Buffer::default()));
    warm_up(cuda, &mut all)?;
    let graph = capture(cuda, &mut all)?;
    Ok((bytes * copies) as f64 / replays(cuda, &graph, 20)?)
}

/// A decode step with fixed places for its inputs and its output.
struct Step {
    backend: Candle,
    decoder: Decoder<Candle>,
    caches: Vec<LayerCache<Candle>>,
    /// Tokens whose logits are made: all.
    positions: Vec<usize>,
    out: Tensor,
}

impl Step {
    const BLOCK_SIZE: usize = 32;

    fn new(path: &std::path::Path, device: &Device, rows: usize, context: usize) -> Result<Self, Fail> {
        let mut backend = Candle::new(device);
        let decoder = Self::decoder(path, &backend, rows)?;
        let per_row = context.div_ceil(Self::BLOCK_SIZE);
        // Keys and values of an earlier context: small random numbers.
        let mut random = Random(5);
        let caches = decoder.caches(&backend, [rows * per_row, Self::BLOCK_SIZE, 0], None)?;
        for cache in &caches {
            let LayerCache::Keys(cache) = cache else { continue };
            let filled = random.tensor(cache.k.dims())?.to_dtype(DType::BF16)?.to_device(device)?;
            cache.k.slice_set(&filled, 0, 0)?;
            cache.v.slice_set(&filled, 0, 0)?;
        }
        let blocks = |row: usize| Arc::new((0..per_row).map(|i| (row * per_row + i) as u32).collect::<Vec<_>>());
        let last = (context - 1) as u32;
        let slots: Vec<u32> = (0..rows).map(|row| (row * per_row * Self::BLOCK_SIZE) as u32 + last).collect();
        let tokens: Vec<u32> = (0..rows as u32).map(|row| row + 5).collect();
        let positions = vec![last; rows];
        let batch_rows: Vec<BatchRow> = (0..rows).map(|row| BatchRow { start: row, len: 1, context, blocks: blocks(row) }).collect();
        let ropes = &decoder.spec.ropes;
        backend.begin(&Batch {
            tokens: &tokens,
            positions: &positions,
            slots: &slots,
            types: &[],
            rows: &batch_rows,
            ropes,
            states: &Default::default(),
        })?;
        let out = Tensor::zeros((rows, decoder.spec.vocab_size), DType::F32, device)?;
        Ok(Self { backend, decoder, caches, positions: (0..rows).collect(), out })
    }

    /// The folder's model, for steps of so many rows.
    fn decoder(path: &std::path::Path, backend: &Candle, rows: usize) -> Result<Decoder<Candle>, Fail> {
        let files = model::folder(path)?;
        let model = Model::from_files(&files)?;
        let checkpoint = Checkpoint::open(&files, model.spec.quantized.as_deref())?;
        let tensors = Tensors::find(&checkpoint, &model)?;
        let limits = model.spec.step_limits(rows, rows, Self::BLOCK_SIZE);
        Ok(Decoder::load(model.spec.clone(), Shard::WHOLE, &tensors, backend, Quantization::AsStored, &limits)?)
    }

    /// The token ids that a step reads.
    fn tokens(&self) -> candle_core::Result<&Tensor> {
        self.backend.tokens()
    }

    fn run(&mut self) -> candle_core::Result<()> {
        self.decoder.forward(&mut self.backend, &mut self.caches)?;
        self.decoder.head(&mut self.backend, &self.positions)?;
        self.out.slice_set(&self.decoder.logits().tensor()?.to_dtype(DType::F32)?, 0, 0)
    }

    fn result(&self) -> Result<Vec<f32>, Fail> {
        Ok(self.out.flatten_all()?.to_vec1()?)
    }
}

/// Our own decode step as a graph: does capture work, do 10,000 replays stay right, what is gained.
pub fn graph(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let (device, cuda) = open(options)?;
    let tiny = options.fixtures.join("ernie-tiny");
    let demo = options.fixtures.join("demo-model");
    let models = [("ernie-tiny", Some(&tiny)), ("demo", Some(&demo)), ("checkpoint", options.checkpoint.as_ref())];
    for (name, path) in models {
        let Some(path) = path else { continue };
        for (rows, context) in [(1, 100), (8, 100)] {
            let name = format!("{name}, {rows} rows, context {context}");
            if let Err(error) = one_graph(part, &name, path, &device, &cuda, rows, context) {
                part.check(format!("{name}: captured and replayed"), false, error.to_string());
            }
        }
    }
    Ok(())
}

fn one_graph(
    part: &mut Part,
    name: &str,
    path: &std::path::Path,
    device: &Device,
    cuda: &CudaDevice,
    rows: usize,
    context: usize,
) -> Result<(), Fail> {
    let mut step = Step::new(path, device, rows, context)?;
    let stream = cuda.cuda_stream();
    step.run()?;
    let first = step.result()?;
    let times = 50;
    let started = Instant::now();
    (0..times).try_for_each(|_| step.run())?;
    let handed = started.elapsed().as_secs_f64();
    stream.synchronize()?;
    let eager = started.elapsed().as_secs_f64() / f64::from(times);
    part.measure(format!("{name}: eager step"), eager * 1e3, "ms");
    part.measure(format!("{name}: eager step, host's part"), handed * 1e3 / f64::from(times), "ms");
    warm_up(cuda, || step.run())?;
    let graph = capture(cuda, || step.run())?;
    let replayed = |step: &Step, inputs: &str, want: &[f32]| -> Result<(), Fail> {
        graph.launch()?;
        stream.synchronize()?;
        if step.result()? == want { Ok(()) } else { Err(format!("a replay on {inputs} differs from the eager step").into()) }
    };
    replayed(&step, "the same inputs", &first)?;
    // Another input in the same place: a replay must see it.
    let tokens = step.tokens()?.copy()?;
    let other: Vec<u32> = (0..rows as u32).map(|row| row + 77).collect();
    step.tokens()?.slice_set(&Tensor::from_vec(other, rows, device)?, 0, 0)?;
    step.run()?;
    let second = step.result()?;
    replayed(&step, "other tokens", &second)?;
    part.check(format!("{name}: other tokens give other logits"), first != second, "by graph and eager alike");
    step.tokens()?.slice_set(&tokens, 0, 0)?;
    let mut seconds = 0.0;
    for round in 0..10 {
        seconds += replays(cuda, &graph, 1_000)? / 10.0;
        replayed(&step, &format!("round {round} of 1,000"), &first)?;
    }
    part.measure(format!("{name}: replay"), seconds * 1e3, "ms");
    part.measure(format!("{name}: replay against eager"), eager / seconds, "times");
    part.check(format!("{name}: captured and replayed"), true, "10,000 replays, bit-equal to the eager step");
    Ok(())
}

/// Host to device: from ordinary memory and from pinned memory.
pub fn transfer(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let (_device, cuda) = open(options)?;
    let stream = cuda.cuda_stream();
    let bytes = 512 * MIB;
    let mut target = cuda.alloc_zeros::<u8>(bytes)?;
    let pageable = vec![7u8; bytes];
    // SAFETY: filled below, before anything reads it.
    let mut pinned = unsafe { stream.context().alloc_pinned::<u8>(bytes) }?;
    let started = Instant::now();
    pinned.as_mut_slice()?.copy_from_slice(&pageable);
    part.measure("memory to pinned memory, one thread", bytes as f64 / started.elapsed().as_secs_f64() / 1e9, "GB/s");
    let rate = |copy: &mut dyn FnMut() -> Result<(), DriverError>| -> Result<f64, Fail> {
        copy()?;
        stream.synchronize()?;
        let started = Instant::now();
        (0..4).try_for_each(|_| copy())?;
        stream.synchronize()?;
        Ok(4.0 * bytes as f64 / started.elapsed().as_secs_f64() / 1e9)
    };
    let from_pageable = rate(&mut || stream.memcpy_htod(&pageable, &mut target))?;
    part.measure("from pageable memory", from_pageable, "GB/s");
    let from_pinned = rate(&mut || stream.memcpy_htod(&pinned, &mut target))?;
    part.measure("from pinned memory", from_pinned, "GB/s");
    let back = stream.clone_dtoh(&target.slice(bytes - 1000..))?;
    part.check("the bytes arrive", back == [7; 1000], "read back from the end");
    Ok(())
}
