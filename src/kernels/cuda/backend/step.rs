//! The inputs of a step: made on the host, brought to the device by one copy, and where they lie there.

use std::ffi::c_int;

use candle_core::{Error, Result};

use super::Cuda;
use super::states::{ListsOfStates, PlacesOfStates};
use crate::cuda::device::{Allocation, Device, Input, Place, memory_of};
use crate::{Batch, BatchRow, RopeTable, StepStates};

/// The step at hand.
pub struct Step {
    pub rows: Vec<BatchRow>,
    pub states: StepStates,
    pub tokens: usize,
    pub highest_token: u32,
    pub highest_position: u32,
    pub highest_type: u32,
    pub highest_slot: u32,
    /// Of all blocks of all rows.
    pub highest_block: u32,
    pub max_blocks: usize,
    pub places: Places,
}

/// Where inputs lie.
pub struct Places {
    pub ids: Place,
    pub positions: Place,
    /// None: of all tokens the first type.
    pub types: Option<Place>,
    pub slots: Place,
    pub sequences: Place,
    pub visible: Place,
    pub contexts: Place,
    pub states: PlacesOfStates,
    pub tables: Place,
    pub tiles: Vec<Tiles>,
}

/// The tiles in which attention on tensor cores takes the rows, for models with so many queries to a key: first token and how many of each.
#[derive(Clone)]
pub struct Tiles {
    pub group: usize,
    /// Of 16 queries, not of 64.
    pub few: bool,
    pub place: Place,
    pub count: usize,
}

/// Cosines and sines `[t, pairs]` of a rope table at the step's positions.
pub struct Angles<M> {
    table: RopeTable,
    frequencies: M,
    pub cosines: M,
    pub sines: M,
}

impl<M> Angles<M> {
    pub fn pairs(&self) -> usize {
        self.table.frequencies.len()
    }
}

/// What is kept from one step to the next, for its memory.
pub struct Inputs<D: Device> {
    staged: D::Inputs,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    types: Vec<u32>,
    slots: Vec<u32>,
    sequences: Vec<u32>,
    visible: Vec<u32>,
    contexts: Vec<u32>,
    states: ListsOfStates,
    tables: Vec<u32>,
    /// Queries to a key in the kinds of attention seen so far.
    groups: Vec<usize>,
    pub angles: Vec<Angles<D::Memory>>,
    /// Tokens and entries of block tables in the largest step, as far as that is known.
    pub most: (usize, usize),
}

impl<D: Device> Default for Inputs<D> {
    fn default() -> Self {
        let none = Vec::new;
        Self {
            staged: D::Inputs::default(),
            tokens: none(),
            positions: none(),
            types: none(),
            slots: none(),
            sequences: none(),
            visible: none(),
            contexts: none(),
            states: ListsOfStates::default(),
            tables: none(),
            groups: Vec::new(),
            angles: Vec::new(),
            most: (0, 0),
        }
    }
}

fn highest(values: &[u32]) -> u32 {
    values.iter().copied().max().unwrap_or(0)
}

/// Rows of many tokens are cut into tiles of 64 queries, the others into tiles of 16 where a group fits.
fn tiles(rows: &[BatchRow], group: usize, few: bool) -> Vec<u32> {
    let per_tile = (if few { 16 } else { 64 } / group).max(1);
    let is_few = |row: &BatchRow| group <= 16 && row.len <= 16 / group;
    let of_row = |row: &BatchRow| {
        let (start, len) = (row.start, row.len);
        (0..len).step_by(per_tile).flat_map(move |at| [(start + at) as u32, per_tile.min(len - at) as u32])
    };
    rows.iter().filter(|row| is_few(row) == few).flat_map(of_row).collect()
}

impl<D: Device> Inputs<D> {
    fn read(&mut self, batch: &Batch<'_>, max_blocks: usize) {
        let keep = |to: &mut Vec<u32>, values: &[u32]| {
            to.clear();
            to.extend_from_slice(values);
        };
        keep(&mut self.tokens, batch.tokens);
        keep(&mut self.positions, batch.positions);
        keep(&mut self.types, batch.types);
        keep(&mut self.slots, batch.slots);
        [&mut self.sequences, &mut self.visible, &mut self.contexts, &mut self.tables].into_iter().for_each(Vec::clear);
        self.states.read(batch);
        for (index, row) in batch.rows.iter().enumerate() {
            self.tables.extend((0..max_blocks).map(|i| row.blocks.get(i).copied().unwrap_or(u32::MAX)));
            self.contexts.push(row.context as u32);
            self.sequences.extend(std::iter::repeat_n(index as u32, row.len));
            self.visible.extend((row.context - row.len + 1..=row.context).map(|seen| seen as u32));
        }
    }

    /// Brings everything to the device.
    fn place(&mut self, device: &D, rows: &[BatchRow]) -> Result<Places> {
        let cut = |group: &usize| [true, false].map(|few| (*group, few, tiles(rows, *group, few)));
        let lists: Vec<(usize, bool, Vec<u32>)> = self.groups.iter().flat_map(cut).collect();
        let (most, most_table) = self.most;
        let input = |name, values, most| Input { name, values, most };
        let mut inputs = vec![
            input(c"tokens", &self.tokens, most),
            input(c"positions", &self.positions, most),
            input(c"types", &self.types, most),
            input(c"slots", &self.slots, most),
            input(c"sequences", &self.sequences, most),
            input(c"visible", &self.visible, most),
            input(c"contexts", &self.contexts, most),
        ];
        inputs.extend(self.states.inputs(most));
        inputs.extend(lists.iter().map(|(.., list)| input(c"tiles", list, 2 * most)));
        // The longest one last: what is behind the values of a step is not copied.
        inputs.push(input(c"tables", &self.tables, most_table));
        let places = device.stage(&mut self.staged, &inputs)?;
        let &[
            ids,
            positions,
            types,
            slots,
            sequences,
            visible,
            contexts,
            begins,
            own,
            goes_on,
            save_begins,
            saves,
            copies,
            ref of_tiles @ ..,
            tables,
        ] = places.as_slice()
        else {
            return Err(Error::Msg("not every input has its place".into()));
        };
        let of_tiles = lists.iter().zip(of_tiles);
        let tiles = of_tiles.map(|((group, few, list), place)| Tiles { group: *group, few: *few, place: *place, count: list.len() / 2 });
        let states = PlacesOfStates { begins, slots: own, goes_on, save_begins, saves, copies };
        let types = (!self.types.is_empty()).then_some(types);
        Ok(Places { ids, positions, types, slots, sequences, visible, contexts, states, tables, tiles: tiles.collect() })
    }
}

impl<D: Device> Cuda<D> {
    pub(super) fn begin_step(&mut self, batch: &Batch<'_>) -> Result<()> {
        self.check_device()?;
        let t = batch.tokens.len();
        let lists = [batch.positions.len(), batch.slots.len(), batch.rows.iter().map(|row| row.len).sum()];
        if lists != [t; 3] || !(batch.types.is_empty() || batch.types.len() == t) {
            return Err(Error::Msg(format!("a step of {t} tokens with positions, slots and rows of {lists:?}")));
        }
        let max_blocks = batch.rows.iter().map(|row| row.blocks.len()).max().unwrap_or(0);
        self.inputs.read(batch, max_blocks);
        let placed = self.inputs.place(&self.device, batch.rows);
        let places = self.noted(placed)?;
        self.angles(batch.ropes, &places, t)?;
        self.step = Some(Step {
            rows: batch.rows.to_vec(),
            states: batch.states.clone(),
            tokens: t,
            highest_token: highest(batch.tokens),
            highest_position: highest(batch.positions),
            highest_type: highest(batch.types),
            highest_slot: highest(batch.slots),
            highest_block: batch.rows.iter().map(|row| highest(&row.blocks)).max().unwrap_or(0),
            max_blocks,
            places,
        });
        Ok(())
    }

    fn angles(&mut self, ropes: &[RopeTable], places: &Places, t: usize) -> Result<()> {
        self.inputs.angles.truncate(ropes.len());
        for (index, table) in ropes.iter().enumerate() {
            if self.inputs.angles.get(index).is_none_or(|angles| angles.table != *table) {
                self.inputs.angles.truncate(index);
                let empty = |name| self.device.allocate(0, name);
                let made = memory_of(&self.device, &table.frequencies, c"frequencies");
                let made = made.and_then(|frequencies| Ok((frequencies, empty(c"cosines")?, empty(c"sines")?)));
                let (frequencies, cosines, sines) = self.noted(made)?;
                self.inputs.angles.push(Angles { table: table.clone(), frequencies, cosines, sines });
            }
            let (device, angles) = (&self.device, &mut self.inputs.angles[index]);
            let (pairs, bytes) = (angles.pairs(), t.max(self.inputs.most.0) * angles.pairs() * size_of::<f32>());
            let sized = device.resize(&mut angles.cosines, bytes, c"cosines").and(device.resize(&mut angles.sines, bytes, c"sines"));
            self.noted(sized)?;
            let angles = &self.inputs.angles[index];
            let (frequencies, cosines, sines) = (angles.frequencies.address(), angles.cosines.address(), angles.sines.address());
            // SAFETY: [t, pairs] each, which outlive the launch.
            self.launch(|functions, stream| unsafe {
                (functions.angles)(stream, places.positions.0, frequencies, table.factor, cosines, sines, t as c_int, pairs as c_int)
            })?;
        }
        Ok(())
    }

    /// The tiles of the step at hand for models with `group` queries to a key.
    pub(super) fn tiles(&mut self, group: usize) -> Result<Vec<Tiles>> {
        if !self.inputs.groups.contains(&group) {
            self.inputs.groups.push(group);
            let Some(step) = &mut self.step else { return Err(Error::Msg("no step has begun".into())) };
            step.places = self.inputs.place(&self.device, &step.rows)?;
        }
        let tiles = self.step()?.places.tiles.iter().filter(|tiles| tiles.group == group && tiles.count > 0);
        Ok(tiles.cloned().collect())
    }
}
