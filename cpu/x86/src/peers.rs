//! What a CPU owes the others that share its RAM: see [`doppel_memory::Peer`].

use doppel_memory::{Asked, PAGE_MASK, Requests};

use crate::Cpu;

impl Cpu {
    /// Calls a device: the other CPUs do not wait for this one meanwhile.
    #[inline]
    pub(crate) fn outside<R>(&mut self, device: impl FnOnce() -> R) -> R {
        if !self.peer.is_shared() {
            return device();
        }
        self.peer.leave();
        let result = device();
        self.come_back();
        result
    }

    /// Waits for the answers of other CPUs, outside.
    pub fn wait_for_peers(&mut self, asked: Asked) {
        if asked.is_empty() {
            return;
        }
        self.peer.leave();
        asked.wait();
        self.come_back();
    }

    /// Enters again in the middle of something. What others have written to the code stays a request.
    fn come_back(&mut self) {
        self.peer.enter();
        if self.peer.has_requests() {
            let requests = self.peer.take_protects();
            self.give_up_writing(&requests);
        }
    }

    /// Takes write permission from the TLBs as others ask for it.
    pub fn give_up_writing(&mut self, requests: &Requests) {
        if requests.protect_all {
            self.empty_tlbs();
            self.given_up.all();
            if let Some(window) = &mut self.window {
                window.close_all();
            }
        }
        for page in &requests.protect {
            self.give_up_writing_to(*page);
        }
    }

    /// Takes write permission for a physical page from the TLBs.
    pub fn give_up_writing_to(&mut self, gpa: u64) {
        self.protect_in_tlbs(gpa & !PAGE_MASK);
        if let Some(window) = &mut self.window {
            window.close(gpa);
        }
        self.given_up.page(gpa & !PAGE_MASK);
        self.ram.tracker().remove_writer(gpa, &self.peer);
    }

    /// Tells the other CPUs of the writes to their code that were noted since the last time, and waits until they have followed.
    /// Returns the writes.
    pub fn publish_code_writes(&mut self) -> Vec<(u64, u32)> {
        let writes = std::mem::take(&mut self.code_writes);
        if self.peer.is_shared() {
            for (gpa, len) in &writes {
                let asked = self
                    .ram
                    .tracker()
                    .tell_others(*gpa, u64::from(*len), &self.peer);
                self.wait_for_peers(asked);
            }
        } else {
            for (gpa, len) in &writes {
                self.peer.note_own_store(*gpa, u64::from(*len));
            }
        }
        writes
    }

    /// From here on a store to the line of this address, which is in RAM, wakes the CPU from MWAIT.
    pub(crate) fn watch_line(&mut self, gpa: u64) {
        if self.ram.tracker().watch(gpa, &self.peer) {
            self.give_up_writing_to(gpa);
            let asked = self.ram.tracker().protect(gpa, &self.peer);
            self.wait_for_peers(asked);
        }
        self.peer.arm();
    }

    /// Does `f` while no other CPU is in guest, as a locked access across two lines needs it. `f` takes nothing that was
    /// looked up before for granted.
    pub(crate) fn alone<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        if !self.peer.is_shared() {
            return f(self);
        }
        let peer = self.peer.clone();
        peer.alone(|| {
            if peer.has_requests() {
                let requests = peer.take_protects();
                self.give_up_writing(&requests);
            }
            f(self)
        })
    }
}
