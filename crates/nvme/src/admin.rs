//! Admin commands (§5).

use crate::{
    command::{Answer, Command, Status},
    controller::{Nvme, Progress},
    data::{PAGE, prp, scatter},
    events::MAX_REQUESTS,
    queue::{CompletionQueue, MAX_ENTRIES, SubmissionQueue},
};

const DELETE_SUBMISSION: u8 = 0x00;
const CREATE_SUBMISSION: u8 = 0x01;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_COMPLETION: u8 = 0x04;
const CREATE_COMPLETION: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const EVENT_REQUEST: u8 = 0x0c;
/// *Physically Contiguous*.
const CONTIGUOUS: u32 = 1;
const INTERRUPTS: u32 = 1 << 1;

impl Nvme {
    /// Carries out an admin command. `None` for one that waits for an event.
    pub(crate) fn admin(&mut self, command: &Command) -> Option<Progress> {
        // §4.4: admin commands over PCI Express use PRPs.
        if command.is_fused() || command.psdt() != 0 {
            return Some(Progress::Done(Status::INVALID_FIELD.into()));
        }
        let result = match command.opcode() {
            DELETE_SUBMISSION => match self.delete_submission(command) {
                Ok(queue) => return Some(Progress::Deleting(queue)),
                Err(status) => Err(status),
            },
            CREATE_SUBMISSION => self.create_submission(command),
            GET_LOG_PAGE => {
                let page = self.log_page(command);
                page.and_then(|page| self.give(command, &page))
            }
            DELETE_COMPLETION => self.delete_completion(command),
            CREATE_COMPLETION => self.create_completion(command),
            IDENTIFY => {
                let structure = self.identify(command);
                structure.and_then(|structure| self.give(command, &structure))
            }
            // The command is not aborted: bit 0.
            ABORT => Ok(1),
            SET_FEATURES => self.set_feature(command),
            GET_FEATURES => self.get_feature(command),
            EVENT_REQUEST => {
                let waiting = &mut self.state.events.requests;
                if waiting.len() < MAX_REQUESTS {
                    waiting.push(command.id());
                    return None;
                }
                Err(Status::EVENT_LIMIT)
            }
            _ => Err(Status::INVALID_OPCODE),
        };
        Some(Progress::Done(Answer::of(result)))
    }

    /// Writes `bytes` where the command wants its data.
    fn give(&self, command: &Command, bytes: &[u8]) -> Result<u32, Status> {
        let len = bytes.len() as u64;
        let segments = prp(command.quad(6), command.quad(8), len, &self.memory)?;
        scatter(&self.memory, &segments, bytes)?;
        Ok(0)
    }

    /// Identifier, size and base of a new queue, checked.
    fn new_queue<T>(command: &Command, queues: &[Option<T>]) -> Result<(usize, u32, u64), Status> {
        let id = (command.dword(10) & 0xffff) as usize;
        let size = (command.dword(10) >> 16) + 1;
        let base = command.quad(6);
        if id == 0 || !matches!(queues.get(id), Some(None)) {
            return Err(Status::QUEUE_IDENTIFIER);
        }
        if !(2..=MAX_ENTRIES).contains(&size) {
            return Err(Status::QUEUE_SIZE);
        }
        if command.dword(11) & CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if !base.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        Ok((id, size, base))
    }

    fn create_completion(&mut self, command: &Command) -> Result<u32, Status> {
        let (id, size, base) = Self::new_queue(command, &self.state.completion)?;
        let vector = (command.dword(11) >> 16) as u16;
        if vector >= self.function.msix_vectors() || vector > 0 && !self.function.uses_messages() {
            return Err(Status::INTERRUPT_VECTOR);
        }
        let vector = (command.dword(11) & INTERRUPTS != 0).then_some(vector);
        if let Some(place) = self.state.completion.get_mut(id) {
            *place = Some(CompletionQueue::new(base, size, vector));
        }
        Ok(0)
    }

    fn create_submission(&mut self, command: &Command) -> Result<u32, Status> {
        let (id, size, base) = Self::new_queue(command, &self.state.submission)?;
        let completion = (command.dword(11) >> 16) as u16;
        if completion == 0 {
            return Err(Status::QUEUE_IDENTIFIER);
        }
        let there = self.state.completion.get(usize::from(completion));
        if !matches!(there, Some(Some(_))) {
            return Err(Status::COMPLETION_QUEUE);
        }
        if let Some(place) = self.state.submission.get_mut(id) {
            *place = Some(SubmissionQueue::new(base, size, completion));
        }
        Ok(0)
    }

    /// Stops taking commands from a queue. It goes when all that was taken is complete (§5.6).
    fn delete_submission(&mut self, command: &Command) -> Result<u16, Status> {
        let id = command.dword(10) as u16;
        match self.state.submission.get_mut(usize::from(id)) {
            Some(Some(queue)) if id > 0 && !queue.deleting => {
                queue.deleting = true;
                Ok(id)
            }
            _ => Err(Status::QUEUE_IDENTIFIER),
        }
    }

    fn delete_completion(&mut self, command: &Command) -> Result<u32, Status> {
        let id = command.dword(10) as u16;
        let used = |queue: &SubmissionQueue| queue.completion == id;
        let in_use = self.state.submission.iter().flatten().any(used);
        match self.state.completion.get_mut(usize::from(id)) {
            Some(Some(_)) if id > 0 && in_use => Err(Status::QUEUE_DELETION),
            Some(place @ Some(_)) if id > 0 => {
                *place = None;
                self.drive_pin();
                Ok(0)
            }
            _ => Err(Status::QUEUE_IDENTIFIER),
        }
    }
}
