//! Ranks: threads that compute one model together, each with a part of its weights (tensor parallelism). Where their partial sums must meet,
//! every rank calls [`Member::all_reduce`], in the same order.
//!
//! Ranks of one process meet in its memory. A rank that fails, or does not come, fails all of them: none waits for ever, and none goes on
//! without the others.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// A rank waits for the others in slices of this length. Slices are counted, and not the time that has passed: a process that was frozen and
/// goes on has waited one slice.
const SLICE: Duration = Duration::from_millis(500);
/// So many slices, two minutes, are more than a step takes anywhere.
const SLICES: usize = 240;
/// Half an hour: ranks that load their weights are not equally fast.
const LOADING_SLICES: usize = 3600;

/// What wakes a rank that waits for others elsewhere than here.
pub type Alarm = Box<dyn Fn() + Send>;

/// Where the ranks of one model meet.
pub struct Ranks {
    slices: usize,
    meeting: Mutex<Meeting>,
    changed: Condvar,
    /// Called once, when the ranks have failed.
    alarms: Mutex<Vec<Alarm>>,
    /// What the first rank told the others.
    told: RwLock<Vec<u8>>,
    /// What each rank brought to this meeting, and to the one before it, which a slow rank may still read.
    parts: [Vec<RwLock<Vec<f32>>>; 2],
}

#[derive(Default)]
struct Meeting {
    /// Ranks that are there.
    arrived: usize,
    /// Meetings that have ended.
    ended: usize,
    /// Why there will be no more.
    failed: Option<String>,
}

/// One rank's place among them.
pub struct Member {
    ranks: Arc<Ranks>,
    rank: usize,
    /// Sums so far.
    sums: usize,
}

impl Ranks {
    /// A place for each of `count` ranks, in order.
    pub fn members(count: usize) -> Vec<Member> {
        Self::with_patience(count, SLICES)
    }

    fn with_patience(count: usize, slices: usize) -> Vec<Member> {
        let parts = || (0..count).map(|_| RwLock::default()).collect();
        let (meeting, changed, alarms, told) = Default::default();
        let ranks = Arc::new(Self { slices, meeting, changed, alarms, told, parts: [parts(), parts()] });
        (0..count).map(|rank| Member { ranks: ranks.clone(), rank, sums: 0 }).collect()
    }

    /// From here on every meeting fails, for the first reason that was given.
    pub fn fail(&self, reason: impl Into<String>) {
        self.meeting().failed.get_or_insert_with(|| reason.into());
        self.changed.notify_all();
        let alarms = std::mem::take(&mut *self.alarms.lock().unwrap_or_else(PoisonError::into_inner));
        alarms.iter().for_each(|alarm| alarm());
    }

    /// Calls `alarm` when the ranks fail: at once, if they have.
    pub fn on_failure(&self, alarm: Alarm) {
        self.alarms.lock().unwrap_or_else(PoisonError::into_inner).push(alarm);
        if let Some(reason) = self.failure() {
            self.fail(reason);
        }
    }

    /// Why the ranks have failed, if they have.
    pub fn failure(&self) -> Option<String> {
        self.meeting().failed.clone()
    }

    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        // What it holds is set as a whole, so a panic elsewhere leaves it sound.
        self.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn count(&self) -> usize {
        self.ranks.parts[0].len()
    }

    pub fn ranks(&self) -> &Arc<Ranks> {
        &self.ranks
    }

    /// Waits until every rank is here, for as long as loading a model may take.
    ///
    /// # Errors
    /// When a rank has failed, or does not come.
    pub fn meet(&self) -> Result<(), String> {
        self.wait(LOADING_SLICES)
    }

    fn wait(&self, slices: usize) -> Result<(), String> {
        let ranks = &self.ranks;
        let mut meeting = ranks.meeting();
        if let Some(reason) = &meeting.failed {
            return Err(reason.clone());
        }
        meeting.arrived += 1;
        if meeting.arrived == self.count() {
            (meeting.arrived, meeting.ended) = (0, meeting.ended + 1);
            ranks.changed.notify_all();
            return Ok(());
        }
        let (this, mut left) = (meeting.ended, slices);
        while meeting.ended == this {
            if let Some(reason) = &meeting.failed {
                return Err(reason.clone());
            }
            if left == 0 {
                let (missing, seconds) = (self.count() - meeting.arrived, (SLICE * slices as u32).as_secs());
                let reason = format!("{missing} of {} ranks did not come within {seconds} s", self.count());
                drop(meeting);
                ranks.fail(reason.clone());
                return Err(reason);
            }
            let (next, waited) = ranks.changed.wait_timeout(meeting, SLICE).unwrap_or_else(PoisonError::into_inner);
            meeting = next;
            left -= usize::from(waited.timed_out());
        }
        Ok(())
    }

    /// What the first rank brings, to be called once.
    ///
    /// # Errors
    /// As [`Member::meet`].
    pub fn share(&self, bytes: Vec<u8>) -> Result<Vec<u8>, String> {
        if self.rank == 0 {
            *self.ranks.told.write().unwrap_or_else(PoisonError::into_inner) = bytes;
        }
        self.meet()?;
        Ok(self.ranks.told.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Makes `values` the sum of what all ranks bring, which must be of one length. The order of the additions is that of the ranks: every
    /// rank gets the same bits, whichever came first.
    ///
    /// # Errors
    /// As [`Member::meet`], or when lengths differ.
    pub fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), String> {
        // A rank can be one sum ahead of another that still reads; two ahead it cannot be, since the one between is a meeting.
        let parts = &self.ranks.parts[self.sums % 2];
        self.sums += 1;
        let mut own = parts[self.rank].write().unwrap_or_else(PoisonError::into_inner);
        own.clear();
        own.extend_from_slice(values);
        drop(own);
        self.wait(self.ranks.slices)?;
        for (rank, part) in parts.iter().enumerate() {
            let part = part.read().unwrap_or_else(PoisonError::into_inner);
            if part.len() != values.len() {
                let reason = format!("rank {rank} brought {} numbers to a sum of {}", part.len(), values.len());
                self.ranks.fail(reason.clone());
                return Err(reason);
            }
            match rank {
                0 => values.copy_from_slice(&part),
                _ => values.iter_mut().zip(part.iter()).for_each(|(sum, value)| *sum += value),
            }
        }
        Ok(())
    }
}

/// A rank that leaves the others takes them along: they would wait for it.
impl Drop for Member {
    fn drop(&mut self) {
        let how = if std::thread::panicking() { "panicked" } else { "ended" };
        self.ranks.fail(format!("rank {} has {how}", self.rank));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs each rank on a thread of its own.
    fn on_threads<T: Send>(members: Vec<Member>, run: impl Fn(Member) -> T + Sync) -> Vec<T> {
        let run = &run;
        std::thread::scope(|scope| {
            let threads: Vec<_> = members.into_iter().map(|member| scope.spawn(move || run(member))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// What rank `rank` brings to sum `round`: numbers whose sum depends on the order of its additions.
    fn part(rank: usize, round: usize) -> Vec<f32> {
        (0..37 + round % 5).map(|i| ((rank * 31 + i * 7 + round) as f32).sin() * 10f32.powi((rank as i32 - 1) * 5)).collect()
    }

    #[test]
    fn sums_are_the_same_bits_on_every_rank_in_every_round() {
        for count in [1, 2, 4, 5] {
            let sums = on_threads(Ranks::members(count), |mut member| {
                let mut sums = Vec::new();
                for round in 0..200 {
                    if round % (member.rank() + 3) == 0 {
                        std::thread::sleep(Duration::from_micros(50 * member.rank() as u64));
                    }
                    let mut values = part(member.rank(), round);
                    member.all_reduce(&mut values).unwrap();
                    sums.push(values);
                }
                member.meet().unwrap();
                sums
            });
            for round in 0..200 {
                let mut expected = part(0, round);
                for rank in 1..count {
                    expected.iter_mut().zip(part(rank, round)).for_each(|(sum, value)| *sum += value);
                }
                assert!(sums.iter().all(|sums| sums[round] == expected), "{count} ranks, round {round}");
            }
        }
    }

    #[test]
    fn a_rank_that_ends_ends_the_others() {
        for gone in 0..3 {
            let results = on_threads(Ranks::members(3), |mut member| {
                member.all_reduce(&mut [1.0])?;
                // Dropped, as by a panic, while the others wait.
                if member.rank() == gone { Ok(()) } else { member.all_reduce(&mut [1.0]) }
            });
            let others: Vec<_> = results.iter().enumerate().filter(|(rank, _)| *rank != gone).collect();
            assert!(
                others.iter().all(|(_, result)| result.as_ref().is_err_and(|reason| *reason == format!("rank {gone} has ended"))),
                "{others:?}"
            );
        }
    }

    #[test]
    fn a_rank_that_does_not_come_is_not_waited_for_for_ever() {
        let mut members = Ranks::with_patience(2, 1);
        let _absent = members.pop();
        let reason = members[0].all_reduce(&mut [1.0]).unwrap_err();
        assert_eq!(reason, "1 of 2 ranks did not come within 0 s");
        assert_eq!(members[0].ranks().failure().as_ref(), Some(&reason));
        assert_eq!(members[0].meet().unwrap_err(), reason, "and nothing is computed any more");
    }

    #[test]
    fn what_the_first_rank_says_reaches_all_and_alarms_ring_once() {
        let told = on_threads(Ranks::members(3), |member| {
            let told = member.share(vec![member.rank() as u8 + 7]).unwrap();
            member.meet().map(|()| told)
        });
        assert!(told.iter().all(|told| *told == Ok(vec![7])), "{told:?}");
        let (members, (rings, heard)) = (Ranks::members(2), std::sync::mpsc::channel());
        let ring = rings.clone();
        members[0].ranks().on_failure(Box::new(move || ring.send("before").unwrap()));
        drop(members);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["before"]);
        let members = Ranks::members(2);
        members[1].ranks().fail("early");
        members[0].ranks().on_failure(Box::new(move || rings.send("after").unwrap()));
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["after"]);
    }

    #[test]
    fn the_first_reason_is_told_and_lengths_must_agree() {
        let results = on_threads(Ranks::members(2), |mut member| {
            let mut values = vec![1.0; 2 + member.rank()];
            member.all_reduce(&mut values).unwrap_err()
        });
        assert!(results.iter().any(|reason| reason.contains("numbers to a sum of")), "{results:?}");
        let members = Ranks::members(2);
        members[0].ranks().fail("the first");
        members[1].ranks().fail("the second");
        assert_eq!(members[1].meet(), Err("the first".to_owned()));
    }
}
