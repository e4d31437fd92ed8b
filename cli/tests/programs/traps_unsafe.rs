//! What user code sees of its traps and of the instructions that do not trap, written down so that two machines can be compared: one line for each
//! case, its name, a colon and what was seen.
//!
//! Arguments: how often each case is repeated, and how many turns of a loop the processor is warmed with before. Each repetition must give the same. Lines that begin with
//! `kernel` tell what depends on the version of the kernel, not on the processor.

#[path = "traps/arch_cases.rs"]
mod cases;
#[path = "traps/arch_loops.rs"]
mod loops;
#[path = "traps/arch_system.rs"]
mod system;
#[path = "traps/arch_traced.rs"]
mod traced;
#[path = "traps/arch_trial.rs"]
mod trial;

fn main() {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse::<u64>().expect("a number"));
    let (repeat, warm) = (numbers.next().unwrap_or(3), numbers.next().unwrap_or(0));
    trial::prepare();
    for (name, said) in cases::all(repeat, warm) {
        println!("{name}: {said}");
    }
    for (name, said) in traced::all() {
        println!("traced {name}: {said}");
    }
    for (name, said) in loops::all(repeat) {
        println!("{name}: {said}");
    }
    println!("done");
}
