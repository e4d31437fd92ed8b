//! Every door takes its seeds, and those cut and damaged a little: what the fuzzer begins with is right without it.

use doppel_guided::DOORS;

#[test]
fn every_door_takes_its_seeds() {
    for door in &DOORS {
        let mut take = (door.open)().unwrap();
        let seeds = (door.seeds)();
        assert!(seeds.len() > 1, "{}", door.name);
        for seed in &seeds {
            assert!(seed.len() <= door.longest, "{}: {}", door.name, seed.len());
            take(seed);
            take(&seed[..seed.len() / 2]);
            let mut damaged = seed.clone();
            for at in (0..seed.len()).step_by(seed.len() / 16 + 1) {
                damaged[at] ^= 0x81;
                take(&damaged);
            }
        }
    }
}

#[test]
fn dictionaries_are_as_the_fuzzer_reads_them() {
    for door in &DOORS {
        let text = door.dictionary();
        let plain = |line: &str| line.starts_with("\"\\x") && line.ends_with('"');
        assert!(text.lines().all(plain), "{text}");
        assert_eq!(text.lines().count(), door.words.len());
    }
}

#[test]
fn a_door_that_does_not_exist_is_an_error_that_names_those_that_do() {
    let error = doppel_guided::Door::named("attic").err().unwrap();
    assert!(error.to_string().contains("qcow2"), "{error}");
}
