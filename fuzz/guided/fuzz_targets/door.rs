//! One door, which `DOPPEL_DOOR` names: for libFuzzer, or with files that are run through it.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
mod fuzzed {
    use doppel_guided::{Door, Take};
    use std::cell::RefCell;

    thread_local! {
        static TAKE: RefCell<Take> = RefCell::new(open());
    }

    fn open() -> Take {
        let name = std::env::var("DOPPEL_DOOR").expect("DOPPEL_DOOR names a door");
        let door = Door::named(&name).expect("a door");
        (door.open)().expect("the door opens")
    }

    libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
        TAKE.with_borrow_mut(|take| take(bytes));
    });
}

#[cfg(not(fuzzing))]
fn main() -> anyhow::Result<()> {
    use anyhow::Context;
    use doppel_guided::Door;
    use std::path::Path;

    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        // For who builds the fuzzer: a folder of seeds, and a dictionary.
        [prepare, folder] if prepare == "--prepare" => {
            for door in &doppel_guided::DOORS {
                let seeds = Path::new(folder).join(door.name);
                std::fs::create_dir_all(&seeds)?;
                for (n, seed) in (door.seeds)().into_iter().enumerate() {
                    std::fs::write(seeds.join(format!("seed{n}")), seed)?;
                }
                let dictionary = Path::new(folder).join(format!("{}.dict", door.name));
                std::fs::write(dictionary, door.dictionary())?;
                println!("{} {}", door.name, door.longest);
            }
            Ok(())
        }
        [name, files @ ..] if !files.is_empty() => {
            let mut take = (Door::named(name)?.open)()?;
            for file in files {
                let bytes = std::fs::read(file).with_context(|| file.clone())?;
                println!("{file}: {} bytes", bytes.len());
                take(&bytes);
            }
            Ok(())
        }
        _ => anyhow::bail!("door --prepare FOLDER, or: door DOOR FILE..."),
    }
}
