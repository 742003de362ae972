//! What CUDA itself costs and gives: the host's time per operation, matrix products at one row, graphs, transfers.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, DriverError};
use candle_core::{DType, Device, Tensor};
use worker_candle::config::Quantization;
use worker_candle::kernels::composed::{self, Batch, linear, rms_norm};
use worker_candle::kernels::{Activations, BatchRow, Inputs, KvCache};
use worker_candle::models::architecture::Architecture;
use worker_candle::models::runner::open_device;
use worker_candle::models::transformer::Transformer;
use worker_candle::models::weights::Checkpoint;

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

/// What the host needs to hand one small operation to the device.
pub fn host_cost(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let (device, cuda) = open(options)?;
    let mut random = Random(3);
    let x = random.tensor(&[1, 1024])?.to_dtype(DType::BF16)?.to_device(&device)?;
    let w = random.tensor(&[1024])?.to_dtype(DType::BF16)?.to_device(&device)?;
    let m = random.tensor(&[64, 1024])?.to_dtype(DType::BF16)?.to_device(&device)?;
    let id = Tensor::from_slice(&[0u32], 1, &device)?;
    type Op<'a> = Box<dyn Fn() -> candle_core::Result<Tensor> + 'a>;
    let ops: [(&str, Op<'_>); 7] = [
        ("add", Box::new(|| x.add(&x))),
        ("silu", Box::new(|| x.silu())),
        ("rms_norm", Box::new(|| rms_norm(&x, &w, 1e-5))),
        ("matmul 1 x 1024 x 64", Box::new(|| linear(&x, &m, None))),
        ("index_select (uploads its shape)", Box::new(|| m.index_select(&id, 0))),
        ("contiguous of a transposed matrix (uploads its strides)", Box::new(|| m.t()?.contiguous())),
        ("upload of one u32", Box::new(|| Tensor::from_slice(&[0u32], 1, &device))),
    ];
    for (name, op) in &ops {
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
    let x = Tensor::ones((rows, k), DType::BF16, device)?;
    let weights = (0..copies).map(|_| Tensor::zeros((n, k), DType::BF16, device)).collect::<candle_core::Result<Vec<_>>>()?;
    let all = || weights.iter().try_for_each(|w| linear(&x, w, None).map(drop));
    warm_up(cuda, all)?;
    let graph = capture(cuda, all)?;
    Ok((bytes * copies) as f64 / replays(cuda, &graph, 20)?)
}

/// A decode step with fixed places for its inputs and its output.
struct Step {
    model: Transformer,
    rows: usize,
    state: RefCell<(Activations, Vec<KvCache>)>,
    out: Tensor,
}

impl Step {
    const BLOCK_SIZE: usize = 32;

    fn new(path: &std::path::Path, device: &Device, rows: usize, context: usize) -> Result<Self, Fail> {
        let files = model::folder(path)?;
        let shape = Architecture::from_files(&files)?;
        let checkpoint = Checkpoint::open(&files, &shape)?;
        let shape = Architecture { tie_word_embeddings: checkpoint.tied, ..shape };
        let model = Transformer::load(shape, &checkpoint, device, Quantization::AsStored)?;
        let per_row = context.div_ceil(Self::BLOCK_SIZE);
        let dims = (rows * per_row, Self::BLOCK_SIZE, model.shape.kv_heads, model.shape.head_dim);
        // Keys and values of an earlier context: small random numbers.
        let mut random = Random(5);
        let filled = random.tensor(&[dims.0, dims.1, dims.2, dims.3])?.to_dtype(DType::BF16)?.to_device(device)?;
        let caches = (0..model.shape.layers)
            .map(|_| Ok(KvCache::Tensors(composed::KvCache { k: filled.copy()?, v: filled.copy()? })))
            .collect::<candle_core::Result<_>>()?;
        let blocks = |row: usize| Arc::new((0..per_row).map(|i| (row * per_row + i) as u32).collect::<Vec<_>>());
        let last = (context - 1) as u32;
        let slots: Vec<u32> = (0..rows).map(|row| (row * per_row * Self::BLOCK_SIZE) as u32 + last).collect();
        let tokens: Vec<u32> = (0..rows as u32).map(|row| row + 5).collect();
        let positions = vec![last; rows];
        let batch_rows: Vec<BatchRow> = (0..rows).map(|row| BatchRow { start: row, len: 1, context, blocks: blocks(row) }).collect();
        let inputs = Inputs { tokens: &tokens, positions: &positions, slots: &slots, rows: &batch_rows, frequencies: model.frequencies() };
        let mut values = composed::Activations::new(device, Self::BLOCK_SIZE);
        values.begin(&inputs)?;
        let out = Tensor::zeros((rows, model.shape.vocab_size), DType::F32, device)?;
        let values = Activations::Tensors(Box::new(values));
        Ok(Self { model, rows, state: RefCell::new((values, caches)), out })
    }

    /// The token ids that a step reads.
    fn tokens(&self) -> Result<Tensor, Fail> {
        match &self.state.borrow().0 {
            Activations::Tensors(values) => Ok(values.batch.as_ref().map(|batch: &Batch| batch.tokens.clone()).ok_or("no batch")?),
            Activations::Cpu(_) => Err("a step on the device".into()),
        }
    }

    fn run(&self) -> candle_core::Result<()> {
        let (values, caches) = &mut *self.state.borrow_mut();
        self.model.forward(values, caches)?;
        self.model.logits(values, &(0..self.rows).collect::<Vec<_>>())?;
        match values {
            Activations::Tensors(values) => self.out.slice_set(values.logits()?, 0, 0),
            Activations::Cpu(_) => candle_core::bail!("a step on the device"),
        }
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
    let step = Step::new(path, device, rows, context)?;
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
    let replayed = |inputs: &str, want: &[f32]| -> Result<(), Fail> {
        graph.launch()?;
        stream.synchronize()?;
        if step.result()? == want { Ok(()) } else { Err(format!("a replay on {inputs} differs from the eager step").into()) }
    };
    replayed("the same inputs", &first)?;
    // Another input in the same place: a replay must see it.
    let tokens = step.tokens()?.copy()?;
    let other: Vec<u32> = (0..rows as u32).map(|row| row + 77).collect();
    step.tokens()?.slice_set(&Tensor::from_vec(other, rows, device)?, 0, 0)?;
    step.run()?;
    let second = step.result()?;
    replayed("other tokens", &second)?;
    part.check(format!("{name}: other tokens give other logits"), first != second, "by graph and eager alike");
    step.tokens()?.slice_set(&tokens, 0, 0)?;
    let mut seconds = 0.0;
    for round in 0..10 {
        seconds += replays(cuda, &graph, 1_000)? / 10.0;
        replayed(&format!("round {round} of 1,000"), &first)?;
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
