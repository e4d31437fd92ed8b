//! The `doppel` command.

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let guest = doppel_cli::guest::debian(&arguments[1], &|line| eprintln!("doppel: {line}"))?;
    println!("{} {}", guest.kernel.display(), guest.initrd.display());
    if let [_, _, script, out] = &arguments[..] {
        let mut archive = doppel_cli::guest::cpio::Archive::new();
        archive.file("doppel/script", 0o755, &std::fs::read(script)?);
        let mut bytes = std::fs::read(guest.initrd)?;
        bytes.extend(archive.finish());
        std::fs::write(out, bytes)?;
    }
    Ok(())
}
