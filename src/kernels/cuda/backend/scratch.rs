//! Memory that operations use for themselves, kept from one to the next.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};

use candle_core::Result;

use super::Cuda;
use crate::cuda::device::{Allocation, Device, Input, Place, memory_of};

/// What a piece of it is for. Its bytes are the operation's until it asks for the same again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Use {
    /// Attention over parts of a context.
    Parts,
    Picked,
    Counts,
    ExpertWeights,
    Offsets,
    Visits,
    Gated,
    ExpertResults,
    Tokens,
    /// Rows of logits that cannot be sampled.
    Failed,
}

impl Use {
    fn name(self) -> &'static CStr {
        match self {
            Self::Parts => c"parts",
            Self::Picked => c"picked experts",
            Self::Counts => c"counts",
            Self::ExpertWeights => c"weights of experts",
            Self::Offsets => c"offsets",
            Self::Visits => c"visits",
            Self::Gated => c"gated",
            Self::ExpertResults => c"results of experts",
            Self::Tokens => c"tokens",
            Self::Failed => c"failed rows",
        }
    }
}

pub struct Scratch<D: Device> {
    memories: HashMap<Use, D::Memory>,
    /// Small lists that an operation gets from the host.
    lists: D::Inputs,
    pub samplings: D::Inputs,
    /// Tables of a layer's matrices, by the address of the first: bytes, and where they lie. They do not move.
    tables: HashMap<usize, (Vec<u8>, D::Memory)>,
}

impl<D: Device> Default for Scratch<D> {
    fn default() -> Self {
        let (lists, samplings) = (D::Inputs::default(), D::Inputs::default());
        Self { memories: HashMap::new(), lists, samplings, tables: HashMap::new() }
    }
}

impl<D: Device> Scratch<D> {
    pub fn memory(&self, which: Use) -> Option<&D::Memory> {
        self.memories.get(&which)
    }
}

impl<D: Device> Cuda<D> {
    pub(super) fn scratch(&mut self, which: Use, bytes: usize) -> Result<*mut c_void> {
        let made = match self.scratch.memories.get_mut(&which) {
            Some(memory) => self.device.resize(memory, bytes, which.name()),
            None => self.device.allocate(bytes, which.name()).map(|memory| {
                self.scratch.memories.insert(which, memory);
            }),
        };
        self.noted(made)?;
        Ok(self.scratch.memories.get(&which).map_or(std::ptr::null_mut(), Allocation::address))
    }

    /// A list for the next launch.
    pub(super) fn list(&mut self, values: &[u32], name: &'static CStr) -> Result<Place> {
        self.check_device()?;
        let staged = self.device.stage(&mut self.scratch.lists, &[Input { name, values, most: 0 }]);
        let places = self.noted(staged)?;
        Ok(places.first().copied().unwrap_or(Place(std::ptr::null())))
    }

    /// A table that is the same in every step, and stays on the device. `key` tells it from others.
    pub(super) fn table(&mut self, key: usize, bytes: &[u8], name: &'static CStr) -> Result<Place> {
        if let Some((held, memory)) = self.scratch.tables.get(&key)
            && held == bytes
        {
            return Ok(Place(memory.address()));
        }
        let made = memory_of(&self.device, bytes, name);
        let memory = self.noted(made)?;
        let place = Place(memory.address());
        self.scratch.tables.insert(key, (bytes.to_vec(), memory));
        Ok(place)
    }
}
