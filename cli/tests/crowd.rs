//! Many busy processes, more mappings than a process of the host may have, and more memory than there is, with user code executed directly.

mod support;

use std::fs;
use std::time::Duration;
use support::{Boot, CLOUD, PASSED, Scratch};

const MINUTE: Duration = Duration::from_secs(60);

/// Processes outnumber a CPU's children; mappings are more than vm.max_map_count allows by default; of the memory under pressure an eighth is swapped out and more.
const SCRIPT: &str = "
mkswap /dev/vda >/dev/null && swapon /dev/vda || exit 1
/doppel/crowd processes 64 10 || exit 2
/doppel/crowd mappings 80000 || exit 3
/doppel/crowd pressure 170 1 || exit 4
";

#[test]
fn crowds_of_processes_and_mappings_and_memory_under_pressure_are_right_executed_directly() {
    let program = support::program("crowd_unsafe", &[]);
    for flags in ["--direct always", "--direct faster"] {
        let scratch = Scratch::new();
        let (disk, stats) = (scratch.path("swap"), scratch.path("stats"));
        fs::File::create(&disk).unwrap().set_len(256 << 20).unwrap();
        let boot = Boot::script(CLOUD, SCRIPT)
            .memory("192M")
            .file("doppel/crowd", 0o755, &program)
            .flag(&format!("--cpus 2 {flags} --stats {}", stats.display()))
            .flag(&format!("--disk {},format=raw", disk.display()));
        let finished = boot.doppel("direct", 5 * MINUTE).expect(PASSED);
        for what in ["processes", "mappings", "pressure"] {
            let passed = format!("crowd: {what} passed");
            assert!(finished.console.contains(&passed), "{}", finished.console);
        }
        let stats: serde_json::Value = serde_json::from_slice(&fs::read(&stats).unwrap()).unwrap();
        let emptied = stats["counters"]["direct_shadow_emptied"].as_u64();
        let always = flags.ends_with("always");
        assert!(
            !always || emptied > Some(0),
            "mappings were not many: {stats}"
        );
    }
}
