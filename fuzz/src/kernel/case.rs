//! One case: a kernel that a seed and a number decide, of which parts can be left out.

use anyhow::{Context as _, Result, bail};
use doppel_x86::CpuFeatures;

use super::image::{self, Image, Supervisors};
use super::layout::*;
use super::steps::Step;
use super::write::{Levels, Offered, Paging, Traits};
use crate::random::Random;

/// RFLAGS but for the arithmetic flags.
const WITHOUT_ARITHMETIC: u64 = !0x8d5;

/// A generated kernel.
#[derive(Clone)]
pub struct Case {
    pub traits: Traits,
    /// Whether notes and frames have the arithmetic flags; engines that do not keep them at faults run only those that have not.
    pub flags: bool,
    /// Where a device writes when it is told to, and what.
    pub dma: (u64, Vec<u8>),
    pub steps: Vec<Step>,
    /// Numbers of steps, in the order in which they run.
    pub schedule: Vec<u16>,
    base: Image,
}

/// What is left of a case: places in the schedule, and items by step and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub schedule: Vec<usize>,
    pub items: Vec<(usize, usize)>,
}

/// Of what a processor has by request, and how many in a hundred kernels use it.
pub const BY_REQUEST: [(CpuFeatures, u64); 2] = [(CpuFeatures::PKU, 25), (CpuFeatures::LA57, 25)];

fn features(r: &mut Random) -> CpuFeatures {
    let drawn = BY_REQUEST.iter().filter(|(_, percent)| r.percent(*percent));
    drawn.map(|(feature, _)| *feature).collect()
}

impl Case {
    /// The case of a number.
    pub fn random(
        supervisors: &Supervisors,
        seed: u64,
        number: u64,
        offered: Offered,
    ) -> Result<Self> {
        // Each step its own, so that what one draws does not decide the others.
        let step = |n| Random::of(seed, number, 3 + n);
        Self::build(
            supervisors,
            &mut Random::of(seed, number, 2),
            None,
            step,
            offered,
        )
    }

    /// A case of parts: one word decides the kernel, each other one a step. What changes a word leaves the other parts as they are.
    pub fn of_words(
        supervisors: &Supervisors,
        kernel: u64,
        steps: &[u64],
        offered: Offered,
    ) -> Result<Self> {
        Self::build(
            supervisors,
            &mut Random::of(kernel, 0, 2),
            Some(steps.len() as u64),
            |n| Random::of(steps[n as usize], 0, 3),
            offered,
        )
    }

    fn build(
        supervisors: &Supervisors,
        r: &mut Random,
        count: Option<u64>,
        step: impl Fn(u64) -> Random,
        offered: Offered,
    ) -> Result<Self> {
        let paging = match r.below(10) {
            0..7 => Paging::Long,
            7 => Paging::Off,
            8 => Paging::Bits32,
            _ => Paging::Pae,
        };
        let long = paging == Paging::Long;
        let features = features(r) & offered.features;
        let five = long && features.contains(CpuFeatures::LA57);
        let levels = match r.below(6) {
            0..3 if five => Levels::Five,
            3..5 if five => Levels::Both,
            _ => Levels::Four,
        };
        let traits = Traits {
            paging,
            pcids: long && levels != Levels::Both && r.percent(30),
            globals: long && r.percent(30),
            physical_bits: offered.physical_bits,
            features,
            levels,
        };
        let base = image::base(supervisors, r, traits);
        let drawn = 2 + r.below(36);
        let count = count.unwrap_or(drawn);
        let steps = (0..count)
            .map(|n| Step::random(&mut step(n), traits))
            .collect::<Result<Vec<_>>>()?;
        let runs = count + r.below(10 * count);
        let schedule = (0..runs)
            .map(|n| match n < count {
                true => n as u16,
                false => r.below(count) as u16,
            })
            .collect();
        let routine = SPARE + r.below(ROUTINE_PAGES) * 0x1000 + r.below(64) * 0x40;
        Ok(Case {
            traits,
            flags: r.percent(50),
            dma: (routine + 2, vec![r.bits() as u8]),
            steps,
            schedule,
            base,
        })
    }

    /// RAM as the kernel finds it; `None` where its code does not fit.
    pub fn image(&self) -> Option<Image> {
        let mask = if self.flags { !0 } else { WITHOUT_ARITHMETIC };
        image::complete(&self.base, &self.steps, &self.schedule, mask)
    }

    /// All of it.
    pub fn everything(&self) -> Kept {
        let items = self.steps.iter().enumerate();
        Kept {
            schedule: (0..self.schedule.len()).collect(),
            items: items
                .flat_map(|(n, s)| (0..s.items.len()).map(move |i| (n, i)))
                .collect(),
        }
    }

    /// The case without what is not kept.
    pub fn only(&self, kept: &Kept) -> Self {
        let mut case = self.clone();
        case.schedule = kept
            .schedule
            .iter()
            .filter_map(|n| self.schedule.get(*n).copied())
            .collect();
        for (n, step) in case.steps.iter_mut().enumerate() {
            let items = std::mem::take(&mut step.items);
            let kept = |i: usize| kept.items.contains(&(n, i));
            step.items = items
                .into_iter()
                .enumerate()
                .filter_map(|(i, item)| kept(i).then_some(item))
                .collect();
        }
        case
    }
}

impl Kept {
    /// From the smallest number of trials on: halves, then single parts, until nothing can be left out.
    pub fn least(mut self, mut fails: impl FnMut(&Kept) -> bool) -> Kept {
        loop {
            let before = self.schedule.len() + self.items.len();
            self = self.shorter(&mut fails, |k| &mut k.schedule);
            self = self.shorter(&mut fails, |k| &mut k.items);
            if self.schedule.len() + self.items.len() == before {
                return self;
            }
        }
    }

    fn shorter<T>(
        mut self,
        fails: &mut impl FnMut(&Kept) -> bool,
        part: fn(&mut Kept) -> &mut Vec<T>,
    ) -> Kept {
        let mut size = part(&mut self).len().div_ceil(2);
        while size > 0 {
            let mut at = part(&mut self).len().saturating_sub(size);
            loop {
                let mut candidate = self.clone();
                let all = part(&mut candidate);
                all.drain(at..(at + size).min(all.len()));
                if fails(&candidate) {
                    self = candidate;
                }
                match at {
                    0 => break,
                    _ => at = at.saturating_sub(size),
                }
            }
            size /= 2;
        }
        self
    }

    /// As arguments: numbers with commas, and `step.item` with commas.
    pub fn text(&self) -> (String, String) {
        let schedule: Vec<_> = self.schedule.iter().map(usize::to_string).collect();
        let items: Vec<_> = self.items.iter().map(|(s, i)| format!("{s}.{i}")).collect();
        (schedule.join(","), items.join(","))
    }

    /// From such arguments.
    pub fn parse(schedule: &str, items: &str) -> Result<Self> {
        let number = |s: &str| {
            s.parse::<usize>()
                .with_context(|| format!("{s} is no number"))
        };
        let parts = |s: &str| -> Vec<String> {
            let parts = s.split(',').filter(|p| !p.is_empty());
            parts.map(str::to_owned).collect()
        };
        let item = |s: &String| match s.split_once('.') {
            Some((step, item)) => Ok((number(step)?, number(item)?)),
            None => bail!("{s} is not step.item"),
        };
        Ok(Kept {
            schedule: parts(schedule)
                .iter()
                .map(|s| number(s))
                .collect::<Result<_>>()?,
            items: parts(items).iter().map(item).collect::<Result<_>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_matter_is_left_out() {
        let all = Kept {
            schedule: (0..9).collect(),
            items: (0..20).map(|n| (n / 4, n % 4)).collect(),
        };
        let least = all.least(|k| {
            k.schedule.contains(&2) && k.schedule.contains(&7) && k.items.contains(&(3, 1))
        });
        assert_eq!(least.text(), ("2,7".to_owned(), "3.1".to_owned()));
        assert_eq!(Kept::parse("2,7", "3.1").unwrap(), least);
    }

    const EVERYTHING: Offered = Offered {
        physical_bits: 48,
        features: CpuFeatures::all(),
    };

    #[test]
    fn a_case_is_a_function_of_seed_and_number() {
        let supervisors = Supervisors::new().unwrap();
        for number in 0..20 {
            let [a, b] = [0, 1].map(|_| Case::random(&supervisors, 5, number, EVERYTHING).unwrap());
            assert_eq!(a.image().unwrap().0, b.image().unwrap().0);
            assert_eq!(a.schedule, b.schedule);
        }
    }
}
