//! Flows by number: slots that are used again, with a generation that tells a late event from one for the new owner.

use crate::user::poller::{Kind, Token};

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// A table of flows of one kind.
pub struct Table<T> {
    kind: Kind,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Table<T> {
    /// An empty one.
    pub fn new(kind: Kind) -> Self {
        Table {
            kind,
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Number of flows.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The token that the next [`Table::insert`] gives.
    pub fn next_token(&self) -> Token {
        let index = self.free.last().copied();
        let index = index.unwrap_or(self.slots.len() as u32);
        let slot = self.slots.get(index as usize);
        Token::new(self.kind, index, slot.map_or(0, |s| s.generation))
    }

    /// Puts a flow in.
    pub fn insert(&mut self, value: T) -> Token {
        let token = self.next_token();
        match self.free.pop() {
            Some(index) => self.slots[index as usize].value = Some(value),
            None => self.slots.push(Slot {
                generation: 0,
                value: Some(value),
            }),
        }
        token
    }

    /// The flow that `token` was given for, if it is still there.
    pub fn get(&self, token: Token) -> Option<&T> {
        let slot = self.slots.get(token.index() as usize)?;
        let same = Token::new(self.kind, token.index(), slot.generation) == token;
        slot.value.as_ref().filter(|_| same)
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let slot = self.slots.get_mut(token.index() as usize)?;
        let same = Token::new(self.kind, token.index(), slot.generation) == token;
        slot.value.as_mut().filter(|_| same)
    }

    /// Takes it out.
    pub fn remove(&mut self, token: Token) -> Option<T> {
        self.get_mut(token)?;
        let slot = &mut self.slots[token.index() as usize];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(token.index());
        slot.value.take()
    }

    /// All flows.
    pub fn iter(&self) -> impl Iterator<Item = (Token, &T)> {
        let kind = self.kind;
        let slots = self.slots.iter().enumerate();
        slots.filter_map(move |(index, slot)| {
            let token = Token::new(kind, index as u32, slot.generation);
            Some((token, slot.value.as_ref()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_token_does_not_reach_the_new_owner_of_a_slot() {
        let mut table = Table::new(Kind::Tcp);
        let foretold = table.next_token();
        let a = table.insert("a");
        assert_eq!(a, foretold);
        assert_eq!(table.remove(a), Some("a"));
        let b = table.insert("b");
        assert_eq!((a.index(), table.get_mut(a)), (b.index(), None));
        assert_eq!(table.remove(a), None);
        assert_eq!(table.get_mut(b), Some(&mut "b"));
        assert_eq!((table.len(), table.iter().count()), (1, 1));
    }
}
