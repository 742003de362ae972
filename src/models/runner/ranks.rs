//! Several ranks that compute one model (tensor parallelism): the engine's thread is the first and leads, each other one has a thread and a
//! device of its own, and gets the plans by a channel.
//!
//! All of them fail together: what happens to one rank ends the others' waiting ([`Ranks::fail`]), and the leader's step fails for good.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use candle_core::{Device, Result as TensorResult};

use super::rank::{Loading, Rank};
use super::{cpu_of, loading_threads};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::files::ModelFiles;
use crate::config::{DeviceChoice, EngineSettings, TensorParallel};
use crate::error::Failure;
use crate::kernels::Backend;
use crate::kernels::candle::Candle;
use crate::kernels::ranks::{Member, Ranks};
use crate::models::choice::Kernels;
use crate::models::device::{device_count, open_device, without_backtrace};
use crate::models::families::Model;
use crate::models::memory::{self, MemoryPlan};
use crate::models::shard::Shard;
use crate::models::tensors::Tensors;
use crate::models::{Plan, Row};

/// How many ranks these settings mean on this device, or on it and the GPUs after it.
pub fn count(device: &Device, settings: &EngineSettings) -> Result<usize, Failure> {
    let first = first_gpu(settings);
    let there = || device_count().saturating_sub(first);
    match settings.tensor_parallel {
        TensorParallel::Ranks(ranks) if !device.is_cpu() && ranks > there().max(1) => {
            let (there, from) = (there(), if first > 0 { format!(" from cuda:{first} on") } else { String::new() });
            Err(Failure::internal(format!("TENSOR_PARALLEL_SIZE={ranks}: there are {there} GPUs{from}; use at most {there}, or auto")))
        }
        TensorParallel::Ranks(ranks) => Ok(ranks.max(1)),
        TensorParallel::Auto if device.is_cpu() => Ok(1),
        TensorParallel::Auto => Ok(there().max(1)),
    }
}

fn first_gpu(settings: &EngineSettings) -> usize {
    if let DeviceChoice::Cuda(index) = settings.device { index } else { 0 }
}

/// The settings of one of several ranks: each GPU is one rank's own, while threads and memory of a host are divided among all.
pub fn settings_of(settings: &EngineSettings, device: &Device, shard: Shard) -> EngineSettings {
    if shard.is_whole() {
        return settings.clone();
    }
    let own = settings.clone();
    match device.is_cpu() {
        true => EngineSettings {
            device: DeviceChoice::Cpu,
            threads: Some((memory::threads(settings) / shard.ranks).max(1)),
            kv_cache_gb: settings.kv_cache_gb.map(|gb| gb / shard.ranks as f64),
            ..own
        },
        false => EngineSettings { device: DeviceChoice::Cuda(first_gpu(settings) + shard.rank), ..own },
    }
}

/// What a rank that follows must know to load its part.
#[derive(Clone)]
pub struct Part {
    pub files: ModelFiles,
    pub settings: EngineSettings,
    pub shard: Shard,
    pub plan: MemoryPlan,
    pub kernels: Kernels,
}

/// The other ranks, from the leader's point of view.
pub struct Followers {
    ranks: Arc<Ranks>,
    /// Of the second rank and those after it.
    channels: Vec<Sender<Message>>,
}

enum Message {
    Step(Arc<Plan>),
    /// Touch so many bytes more.
    Prefault(usize),
    #[cfg(test)]
    Break(Break),
}

/// What tests let happen to a rank in its next step, while the leader waits for its part of a sum.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Break {
    Panic,
    Error,
    /// The thread ends as if it had never been there.
    Vanish,
}

impl Followers {
    /// Starts a thread for each part, which loads it and waits for the others; with the leader's own place among them.
    pub fn start(parts: Vec<Part>) -> Result<(Self, Member), Failure> {
        let mut members = Ranks::members(parts.len() + 1).into_iter();
        let Some(leader) = members.next() else { return Err(Failure::internal("no ranks")) };
        let mut followers = Self { ranks: leader.ranks().clone(), channels: Vec::new() };
        for (part, member) in parts.into_iter().zip(members) {
            let (send, receive) = channel();
            let name = format!("rank-{}", member.rank());
            std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || follow(&part, member, &receive))
                .map_err(|error| Failure::internal(format!("cannot start the thread {name}: {error}")))?;
            followers.channels.push(send);
        }
        Ok((followers, leader))
    }

    /// Lets all ranks run the plan's tokens, the leader by `own`.
    ///
    /// # Errors
    /// Any is the end: of no rank is known how far it came. See [`Followers::failure`].
    pub fn lead(&self, plan: &Plan, own: impl FnOnce() -> TensorResult<()>) -> TensorResult<()> {
        let _watch = Watch(&self.ranks);
        let plan = Arc::new(without_sampling(plan));
        self.send(|| Message::Step(plan.clone()));
        drop(plan);
        let done = own();
        if let Err(error) = &done {
            self.ranks.fail(format!("rank 0: {}", without_backtrace(error)));
        }
        match self.ranks.failure() {
            Some(reason) => candle_core::bail!("{reason}"),
            None => done,
        }
    }

    pub fn prefault(&self, most: usize) {
        self.send(|| Message::Prefault(most));
    }

    /// Why the ranks can compute nothing any more, if that is so.
    pub fn failure(&self) -> Option<String> {
        self.ranks.failure()
    }

    #[cfg(test)]
    pub fn break_rank(&self, rank: usize, what: Break) {
        self.channels[rank - 1].send(Message::Break(what)).unwrap();
    }

    fn send(&self, message: impl Fn() -> Message) {
        // A thread that has ended has said why.
        self.channels.iter().for_each(|channel| drop(channel.send(message())));
    }
}

/// The others' threads end, from wherever they are.
impl Drop for Followers {
    fn drop(&mut self) {
        self.ranks.fail("the model is no longer needed");
    }
}

/// A leader that panics takes the others along.
struct Watch<'a>(&'a Ranks);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail("rank 0 has panicked");
        }
    }
}

/// What others than the leader need of a plan. What samples wait for and hold stays with the leader.
fn without_sampling(plan: &Plan) -> Plan {
    let row = |row: &Row| Row { blocks: row.blocks.clone(), sampling: None, score: None, ..*row };
    let Plan { tokens, positions, slots, types, states, rows } = plan;
    Plan {
        tokens: tokens.clone(),
        positions: positions.clone(),
        slots: slots.clone(),
        types: types.clone(),
        states: states.clone(),
        rows: rows.iter().map(row).collect(),
    }
}

/// A part that was loaded, whatever its device.
trait Follower {
    fn join(&mut self, member: Member) -> Result<(), Failure>;
    fn run(&mut self, plan: &Plan) -> TensorResult<()>;
    fn touch(&mut self, most: usize);
}

impl<B: Backend> Follower for Rank<B> {
    fn join(&mut self, member: Member) -> Result<(), Failure> {
        self.connect(member)
    }

    fn run(&mut self, plan: &Plan) -> TensorResult<()> {
        self.forward(plan)
    }

    fn touch(&mut self, most: usize) {
        self.prefault(most);
    }
}

/// The life of a rank that follows. However it ends, the others are told.
fn follow(part: &Part, member: Member, messages: &Receiver<Message>) {
    let (ranks, rank) = (member.ranks().clone(), member.rank());
    let life = || -> Result<(), String> {
        // NOTE: a rank that is dropped says that it has ended, and by then the reason must have been told.
        let told = |reason: String| {
            ranks.fail(format!("rank {rank}: {reason}"));
            reason
        };
        let mut part = load(part).map_err(|failure| told(failure.message))?;
        part.join(member).map_err(|failure| told(failure.message))?;
        serve(part.as_mut(), messages).map_err(|error| told(without_backtrace(&error)))
    };
    if let Ok(Err(reason)) = std::panic::catch_unwind(AssertUnwindSafe(life)) {
        tracing::debug!("rank {rank} has ended: {reason}");
    }
}

/// Runs what the leader sends until it sends no more.
fn serve(part: &mut dyn Follower, messages: &Receiver<Message>) -> TensorResult<()> {
    #[cfg(test)]
    let mut broken = None;
    while let Ok(message) = messages.recv() {
        match message {
            #[cfg(test)]
            Message::Step(_) if broken.is_some() => match broken {
                Some(Break::Error) => candle_core::bail!("told to fail"),
                Some(Break::Vanish) => return Ok(()),
                _ => panic!("told to panic"),
            },
            Message::Step(plan) => part.run(&plan)?,
            Message::Prefault(most) => part.touch(most),
            #[cfg(test)]
            Message::Break(what) => broken = Some(what),
        }
    }
    Ok(())
}

/// Each rank reads the files by itself: what is mapped is there once.
fn load(part: &Part) -> Result<Box<dyn Follower>, Failure> {
    let Part { files, settings, shard, plan, kernels } = part;
    let device = open_device(settings.device)?;
    let model = Model::from_files(files)?.for_task(files, settings)?;
    let checkpoint = Checkpoint::open(files, model.spec.quantized.as_deref())?;
    let tensors = Tensors::find(&checkpoint, &model)?;
    let loading = Loading { model: &model, tensors: &tensors, shard: *shard, plan, settings };
    let (limits, pool) = (loading.limits()?, loading_threads(memory::threads(settings))?);
    Ok(match *kernels == Kernels::Cpu {
        true => Box::new(Rank::load(&loading, cpu_of(&limits, settings)?, &limits, &pool)?),
        false => Box::new(Rank::load(&loading, Candle::new(&device), &limits, &pool)?),
    })
}
